"""Alternating rounds: what every benchmark here measures with, so that a noisy machine hits both sides alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = 7


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int = ROUNDS) -> None:
    """Time the two in turn after a warm-up and print the medians and the ratio theirs / ours, its median and range."""
    ours(), theirs()
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(rounds)]
    ratios = [b / a for b, a in pairs]
    b, a = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{name}: {statistics.median(ratios):.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f}, n={rounds}); "
        f"{1000 * a:.1f} ms against {1000 * b:.1f} ms",
        flush=True,
    )


def hardware() -> str:
    """Name the processor and the number of cores this process may use."""
    with Path("/proc/cpuinfo").open() as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
