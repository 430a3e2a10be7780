"""`python benchmarks/views.py [FOLDER]`: view pairs a second, DALI against the official PIL transform in two workers.

At 32 px on the folder's JPEG files (without one, on drawn ones) and at 224 px on drawn files of 500 x 375 px; there
also from shards that were shrunk, with what that does to the pictures.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import official
import pictures
import rounds

from barlow.core import provenance
from barlow.settings import loading, params
from barlow.training.views import TwinViews, pairs


def rate(batches, batch_size: int, n: int) -> float:
    """Return the samples a second of `n` batches, after two that come first."""
    for _ in islice(batches, 2):
        pass
    started = time.perf_counter()
    done = sum(1 for _ in islice(batches, n))
    return done * batch_size / (time.perf_counter() - started)


def endless(twin_views):
    while True:
        yield from twin_views


def compare(name: str, paths, tars, views: params.Views, batch_size: int, n: int, times: int = 5) -> None:
    """Measure the two in turn; the workers of one are gone while the other is measured."""
    ours, theirs = [], []
    for _ in range(times):
        twin_views = TwinViews(tars, views, batch_size, 0)
        ours.append(rate(endless(twin_views), batch_size, n))
        del twin_views
        theirs.append(rate(iter(official.loader(paths, views, batch_size)), batch_size, n))
    ratios = (a / b for a, b in zip(ours, theirs, strict=True))
    rates = f"{statistics.median(ours):.0f} samples/s against {statistics.median(theirs):.0f}"
    print(f"views {name}: {rounds.faster(ratios)}; {rates}", flush=True)


def effect(whole, shrunk, views: params.Views, n: int) -> str:
    """Return how the same views differ from the two shards, with the same windows and distortions."""
    plain = replace(views, jitter=0.0, grayscale=0.0, solarize=(0.0, 0.0))
    originals, others = (np.concatenate(pairs(tars, plain, n, 0)).astype(float) for tars in (whole, shrunk))
    difference = np.abs(originals - others).mean()
    return f"mean difference {difference:.2f} of 255 levels, standard deviation of the pictures {originals.std():.0f}"


if __name__ == "__main__":
    print(provenance.hardware())
    settings = loading.load(Path(__file__).parent.parent / "params.yaml").views
    small = replace(settings, size=32, crop_area=(0.08, 1.0), grayscale=0.2, blur_sigma=(0.1, 2.0))
    large = replace(small, size=224)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "small").mkdir()
        (work / "large").mkdir()
        if len(sys.argv) > 1:
            paths = sorted(Path(sys.argv[1]).rglob("*.jpg"))[:10_000]
        else:
            paths = pictures.files(work / "small", 4000, 32, 32)
        compare("32 px", paths, pictures.shard(paths, work / "small.tar"), small, 128, 30)
        paths = pictures.files(work / "large", 1200, 375, 500)
        whole = pictures.shard(paths, work / "whole.tar")
        compare("224 px", paths, whole, large, 64, 15)
        for max_side in (400, 320, 256):
            shrunk = pictures.shard(paths, work / f"shrunk-{max_side}.tar", max_side)
            compare(f"224 px, shard.max_side={max_side}", paths, shrunk, large, 64, 15, 5)
            print(f"  {effect(whole, shrunk, large, 256)}", flush=True)
