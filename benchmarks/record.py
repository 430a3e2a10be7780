"""`make record`: keep the metrics of the last `make repro` as the ones that README.md shows.

Writes benchmarks/default_run.json, and the table of `barlow summary` into README.md. No stage writes either file, so
another `make repro`, on any processor, changes neither README.md nor the record that its test reads.
"""

import os
import re
from dataclasses import asdict
from pathlib import Path

from barlow.core import files, provenance
from barlow.evaluation import tables
from barlow.evaluation.figures import Evaluation, FineTuning, read

README, RECORD = Path("README.md"), Path("benchmarks/default_run.json")

if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    evaluation, finetuning = read(Evaluation, files.EVALUATION), read(FineTuning, files.FINETUNING)
    metrics = {"evaluate": asdict(evaluation), "finetune": asdict(finetuning)}
    files.write_json(RECORD, {"hardware": provenance.hardware(), **metrics})
    table = f"```\n{tables.table(evaluation, finetuning)}\n```"
    shown = re.compile(r"```\n {20,}pretrained .*?```", flags=re.DOTALL)
    with files.replacing(README) as temporary:
        temporary.write_text(shown.sub(lambda _: table, README.read_text(), count=1))
