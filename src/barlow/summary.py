"""`barlow summary`: the headline figures of the last run, and where its report lies."""

from __future__ import annotations

from barlow.core import files
from barlow.evaluation import tables


def run() -> None:
    """Print reports/evaluate.json and reports/finetune.json as a table.

    Raises:
        UserError: nothing was evaluated yet.
    """
    path = files.REPORTS / "evaluate.json"
    files.require(path, "evaluate")
    finetuned = files.REPORTS / "finetune.json"
    print(tables.table(files.read_json(path) | (files.read_json(finetuned) if finetuned.exists() else {})))
    for what, where in {"encoder": files.ONNX, "report": files.REPORT}.items():
        print(f"{what:<26}{where if where.exists() else 'not there: run `dvc repro`'}")
