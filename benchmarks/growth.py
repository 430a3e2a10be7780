"""`python benchmarks/growth.py [MAX] [--against SRC [--side PX] [--rounds N]]`: how ingest, validate and shard grow.

Alone: seconds of each stage for 1,000 to MAX (100,000) small PNG files. Each stage is run as its command, start-up
included. The exponent is that of the last tenfold growth: 1 is linear.

`--against` names the `src` folder of another version: ingest and shard of both, in turn, on MAX JPEG files of PX (48)
pixels. The ratio is that of both stages together, ours by theirs.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
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


def photograph(folder: Path, count: int, side: int) -> None:
    """Write JPEG files of `side` x 3/4 `side` pixels: smooth colours with some noise."""
    folder.mkdir()
    noise = np.random.default_rng(0).normal(0, 8, (side * 3 // 4, side, 3))
    for i in range(count):
        low = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        smooth = Image.fromarray(low).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
        image = Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i:07d}.jpg", quality=90)


def prepare(project: Path, images: Path) -> None:
    """Write the params of a project that has seen nothing yet."""
    (project / "data").mkdir(parents=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ingest"] |= {"source": str(images), "labels": "none"}
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def measure(project: Path, source: Path = ROOT / "src") -> list[float]:
    """Return the seconds of each stage, run with the code in `source`."""
    times = []
    for stage in STAGES:
        command = [sys.executable, "-W", "ignore", "-m", "barlow.cli", stage]
        environment = os.environ | {"PYTHONPATH": str(source)}
        options = {"cwd": project, "check": True, "stdout": subprocess.DEVNULL, "env": environment}
        times.append(rounds.seconds(partial(subprocess.run, command, **options)))
    return times


def compare(work: Path, count: int, side: int, against: Path, repeats: int) -> None:
    photograph(work / "images", count, side)
    ratios = []
    for _ in range(repeats):
        seconds = []
        for source in (ROOT / "src", against):
            prepare(work / "project", work / "images")
            ingest, _, shard = measure(work / "project", source)
            shutil.rmtree(work / "project")
            print(f"{source}: ingest {ingest:.1f} s, shard {shard:.1f} s", flush=True)
            seconds.append(ingest + shard)
        ratios.append(seconds[0] / seconds[1])
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}, n={repeats}"
    ratio = f"{statistics.median(ratios):.2f} times as long ({spread})"
    print(f"{count:,} JPEG files of {side} px: ingest + shard take {ratio}")


def grow(work: Path, largest: int) -> None:
    print("| images | " + " | ".join(STAGES) + " | exponents |")
    print("|---" * (len(STAGES) + 2) + "|")
    before, done = None, 0
    for n in (10**power for power in range(3, round(math.log10(largest)) + 1)):
        draw(work / "images", done, n)
        done = n
        prepare(work / str(n), work / "images")
        times = measure(work / str(n))
        exponents = [f"{math.log10(b / a):.2f}" for a, b in zip(before or [], times, strict=False)]
        print(f"| {n:,} | " + " | ".join(f"{t:.1f} s" for t in times) + f" | {', '.join(exponents)} |", flush=True)
        before = times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("max", nargs="?", type=int, default=100_000)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--side", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(provenance.hardware())
    with tempfile.TemporaryDirectory() as work:
        if given.against:
            compare(Path(work), given.max, given.side, given.against.resolve(), given.rounds)
        else:
            grow(Path(work), given.max)
