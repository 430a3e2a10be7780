"""`make seeds`: the headline figures for three seeds, on the shards that `make repro` left.

Each seed trains its own encoder and draws its own random one; data, params and protocol are those of params.yaml.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import rounds
import yaml

from barlow import files

SEEDS = (0, 1, 2)


def run(seed: int) -> dict[str, float]:
    """Pretrain and evaluate with another seed in a folder of its own; return reports/evaluate.json and the seconds."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["pretrain"]["seed"] = params["evaluate"]["seed"] = seed
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        (project / "params.yaml").write_text(yaml.safe_dump(params))
        (project / "data").mkdir()
        (project / "data/shards").symlink_to(files.SHARDS.resolve())
        for stage in ("pretrain", "evaluate"):
            subprocess.run([sys.executable, "-m", "barlow.cli", stage], cwd=project, check=True, stdout=sys.stderr)
        curve = (project / "reports/pretrain/plots/metrics/seconds.tsv").read_text().splitlines()[1:]
        seconds = sum(float(line.split("\t")[1]) for line in curve)
        return files.read_json(project / "reports/evaluate.json") | {"seconds": seconds}


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    print(rounds.hardware())
    print("| seed | linear probe | random encoder | gain | kNN | random encoder | gain | pretraining |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in SEEDS:
        metrics = run(seed)
        cells = []
        for name in ("linear_top1", "knn_top1"):
            for key in (name, f"random_{name}"):
                cells.append(f"{metrics[key]:.1f} ({metrics[f'{key}_low']:.1f}-{metrics[f'{key}_high']:.1f})")
            cells.append(f"{metrics[name] - metrics[f'random_{name}']:+.1f}")
        print(f"| {seed} | {' | '.join(cells)} | {metrics['seconds']:.0f} s |", flush=True)
