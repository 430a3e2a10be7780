"""Alternating rounds: what every benchmark here measures with, so that a noisy machine hits both sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

ROUNDS = 7


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int = ROUNDS) -> None:
    """Time the two in turn after a warm-up and print the medians and the ratio theirs / ours, its median and range."""
    ours(), theirs()
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(rounds)]
    b, a = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{name}: {faster(b / a for b, a in pairs)}; {1000 * a:.1f} ms against {1000 * b:.1f} ms", flush=True)


def faster(ratios: Iterable[float]) -> str:
    """Put the ratios of the rounds into words: the median, the range and how many there are."""
    each = list(ratios)
    return f"{statistics.median(each):.2f} times faster ({min(each):.2f} to {max(each):.2f}, n={len(each)})"


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
