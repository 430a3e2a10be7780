"""`make seeds`: the headline for three seeds, on the shards that `make repro` left; writes benchmarks/seeds.json.

Each seed trains its own encoder, and draws its own random one and its own few labels; data, params and protocol are of
params.yaml. The table goes into benchmarks/RESULTS.md.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from barlow.core import files, provenance

SEEDS = (0, 1, 2)
NAMES = [f"{prefix}{name}_top1" for name in ("linear", "knn") for prefix in ("", "random_")]


def run(seed: int) -> dict[str, float]:
    """Pretrain and evaluate with another seed in a folder of its own; return the figures and pretraining's seconds."""
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
        metrics = files.read_json(project / "reports/evaluate.json")
        seconds = files.read_json(project / "reports/pretrain.json")["seconds"]
    return {f"{name}{end}": metrics[f"{name}{end}"] for name in NAMES for end in ("", "_low", "_high")} | {
        "seed": seed,
        "seconds": seconds,
    }


def row(metrics: dict[str, float]) -> str:
    cells = [str(metrics["seed"])]
    for pretrained, random in zip(NAMES[::2], NAMES[1::2], strict=True):
        for key in (pretrained, random):
            cells.append(f"{metrics[key]:.1f} ({metrics[f'{key}_low']:.1f}-{metrics[f'{key}_high']:.1f})")
        cells.append(f"{metrics[pretrained] - metrics[random]:+.1f}")
    return f"| {' | '.join(cells)} | {metrics['seconds']:.0f} s |"


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    print(provenance.hardware())
    print("| seed | linear probe | random encoder | gain | kNN | random encoder | gain | pretraining |")
    print("|---|---|---|---|---|---|---|---|")
    found = []
    for seed in SEEDS:
        found.append(run(seed))
        print(row(found[-1]), flush=True)
    files.write_json(Path("benchmarks/seeds.json"), found)
