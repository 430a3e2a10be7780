"""`barlow summary`: print the headline of the last run, and where its encoder and its report lie."""

from __future__ import annotations

from barlow.core import files
from barlow.evaluation import tables, verdict
from barlow.evaluation.figures import Evaluation, FineTuning, read


def run() -> None:
    """Print reports/evaluate.json and reports/finetune.json as a table.

    Raises:
        UserError: nothing was evaluated yet.
    """
    files.require(files.EVALUATION, "evaluate")
    if not files.ONNX.exists():
        print("Nothing was run here yet. These figures are in git, of an earlier run:")
    finetuning = read(FineTuning, files.FINETUNING) if files.FINETUNING.exists() else None
    evaluation = read(Evaluation, files.EVALUATION)
    pretraining = files.read_json(files.PRETRAINING) if files.PRETRAINING.exists() else None
    print(tables.table(evaluation, finetuning), *verdict.lines(evaluation, pretraining), "", sep="\n")
    for title, path in {"encoder": files.ONNX, "report": files.REPORT}.items():
        print(f"{title:<26}{path if path.exists() else 'not there: run `dvc repro`'}")
