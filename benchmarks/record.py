"""`make record`: keep the figures of the last `make repro` as those that README.md shows.

Writes benchmarks/default_run.json, and into README.md the table that `barlow summary` prints of them. No stage writes
either, so another `make repro`, on any processor, leaves what README.md says and what its test reads as they are.
"""

import os
import re
from pathlib import Path

from barlow.core import files, provenance
from barlow.evaluation import tables

README, RECORD = Path("README.md"), Path("benchmarks/default_run.json")

if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    metrics = files.read_json(files.REPORTS / "evaluate.json") | files.read_json(files.REPORTS / "finetune.json")
    files.write_json(RECORD, {"hardware": provenance.hardware(), "metrics": metrics})
    with files.replacing(README) as temporary:
        table = re.compile(r"```\n {20,}pretrained .*?```", flags=re.DOTALL)
        temporary.write_text(table.sub(lambda _: f"```\n{tables.table(metrics)}\n```", README.read_text(), count=1))
