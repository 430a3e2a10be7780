"""`python benchmarks/growth.py [MAX]`: seconds of ingest, validate and shard for 1,000 to MAX (100,000) small images.

Each stage is run as its command, start-up included. The exponent is that of the last tenfold growth: 1 is linear.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import rounds
import yaml
from PIL import Image

from barlow.core import provenance

ROOT = Path(__file__).parent.parent
STAGES = ("ingest", "validate", "shard")


def draw(folder: Path, first: int, last: int) -> None:
    """Write PNG files of noise, 16 x 16 pixels, 1,000 per folder."""
    for i in range(first, last):
        if i % 1000 == 0:
            (folder / f"{i // 1000:04d}").mkdir(parents=True)
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i // 1000:04d}/{i:07d}.png", compress_level=1)


def measure(project: Path) -> list[float]:
    """Return the seconds of each stage in a project that has seen nothing yet."""
    times = []
    for stage in STAGES:
        command = [sys.executable, "-W", "ignore", "-m", "barlow.cli", stage]
        options = {"cwd": project, "check": True, "stdout": subprocess.DEVNULL}
        times.append(rounds.seconds(partial(subprocess.run, command, **options)))
    return times


if __name__ == "__main__":
    largest = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    print(provenance.hardware())
    print("| images | " + " | ".join(STAGES) + " | exponents |")
    print("|---" * (len(STAGES) + 2) + "|")
    with tempfile.TemporaryDirectory() as work:
        images, before, done = Path(work) / "images", None, 0
        for n in (10**power for power in range(3, round(math.log10(largest)) + 1)):
            draw(images, done, n)
            done = n
            project = Path(work) / str(n)
            (project / "data").mkdir(parents=True)
            params = yaml.safe_load((ROOT / "params.yaml").read_text())
            params["ingest"] |= {"source": str(images), "labels": "none"}
            (project / "params.yaml").write_text(yaml.safe_dump(params))
            times = measure(project)
            exponents = [f"{math.log10(b / a):.2f}" for a, b in zip(before or [], times, strict=False)]
            print(f"| {n:,} | " + " | ".join(f"{t:.1f} s" for t in times) + f" | {', '.join(exponents)} |", flush=True)
            before = times
