"""`make seeds`: measure the headline for three seeds, on the shards of `make repro`; writes benchmarks/seeds.json.

Each seed trains its own encoder and draws its own random encoder and labelled images. All else is as in params.yaml.
The printed table goes into benchmarks/RESULTS.md.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from barlow.core import files, provenance
from barlow.evaluation.figures import Evaluation, read

SEEDS = (0, 1, 2)
ENCODERS, METHODS = ("pretrained", "random"), ("linear", "knn")


def run(seed: int) -> dict[str, Any]:
    """Pretrain and evaluate with another seed in a temporary folder; return accuracies and pretraining's seconds."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    for stage in ("pretrain", "extract", "evaluate"):
        params[stage]["seed"] = seed
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        (project / "params.yaml").write_text(yaml.safe_dump(params))
        (project / "data").mkdir()
        (project / "data/shards").symlink_to(files.SHARDS.resolve())
        for stage in ("pretrain", "extract", "evaluate"):
            subprocess.run([sys.executable, "-m", "barlow.cli", stage], cwd=project, check=True, stdout=sys.stderr)
        encoders = read(Evaluation, project / files.EVALUATION).encoders
        seconds = files.read_json(project / files.PRETRAINING)["seconds"]
    measured = {name: {kind: asdict(getattr(encoders[name], kind)) for kind in METHODS} for name in ENCODERS}
    return {"seed": seed, "seconds": seconds, "encoders": measured}


def row(record: dict[str, Any]) -> str:
    """Return a row of the table in Markdown."""
    cells = [str(record["seed"])]
    for kind in METHODS:
        pretrained, random = (record["encoders"][name][kind] for name in ENCODERS)
        cells += [f"{each['top1']:.1f} ({each['low']:.1f}-{each['high']:.1f})" for each in (pretrained, random)]
        cells.append(f"{pretrained['top1'] - random['top1']:+.1f}")
    return f"| {' | '.join(cells)} | {record['seconds']:.0f} s |"


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    print(provenance.hardware())
    print("| seed | linear probe | random encoder | gain | kNN | random encoder | gain | pretraining |")
    print("|---|---|---|---|---|---|---|---|")
    records = []
    for seed in SEEDS:
        records.append(run(seed))
        print(row(records[-1]), flush=True)
    files.write_json(Path("benchmarks/seeds.json"), records)
