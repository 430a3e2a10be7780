"""Lay out lines and points of a page's charts for SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

PLOT = (54, 8, 390, 160)  # plotted area of a small chart: left, top, right and bottom in SVG units
TALL = (40, 10, 470, 250)  # plotted area of a large chart
SHIFT = 4  # SVG units between the marks of series at the same x


class Point(NamedTuple):
    """A measured mean with its interval."""

    x: float  # above 0
    y: float
    low: float  # ends of the 95 % interval
    high: float
    dots: Sequence[float] = ()  # the single measurements behind the mean


def curves(series: Sequence[Sequence[float]], log: bool) -> dict[str, Any]:
    """Lay out curves with one value per epoch: SVG points, and (place, text) of the ticks of both axes.

    The vertical axis is linear from 0. With `log` it is logarithmic over the values' range, if all are above 0.
    """
    left, top, right, bottom = PLOT
    values = [value for line in series for value in line]
    epochs = max(map(len, series))
    log = log and min(values) > 0
    low, high = (min(values) if log else min(0.0, *values)), max(values)
    scaled = math.log if log else float
    height = (scaled(high) - scaled(low)) or 1.0
    marks = decades(low, high) if log and high > 8 * low else ticks(low, high, 4)

    def x(epoch: float) -> float:
        return round(left + (epoch - 1) / max(epochs - 1, 1) * (right - left), 1)

    def y(value: float) -> float:
        return round(bottom - (scaled(value) - scaled(low)) / height * (bottom - top), 1)

    return {
        "lines": [[(x(epoch), y(value)) for epoch, value in enumerate(line, 1)] for line in series],
        "x_ticks": [(x(epoch), f"{epoch:g}") for epoch in ticks(1, epochs, 8) if epoch == int(epoch)],
        "y_ticks": [(y(value), f"{value:.4g}") for value in marks],
        "log": log,
        "epochs": epochs,
    }


def points(series: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """Lay out measured points: y from 0 to 100 percent, x logarithmic."""
    left, top, right, bottom = TALL
    everything = [point for line in series.values() for point in line]
    xs = sorted({point.x for point in everything})

    def x(value: float) -> float:
        share = math.log(value / xs[0]) / math.log(xs[-1] / xs[0]) if len(xs) > 1 else 0.5
        return round(left + 24 + share * (right - left - 48), 1)

    def y(value: float) -> float:
        return round(bottom - value / 100 * (bottom - top), 1)

    laid = {}
    for i, (name, line) in enumerate(series.items()):
        shift = (i - (len(series) - 1) / 2) * SHIFT
        laid[name] = [
            {
                "x": round(x(p.x) + shift, 1),
                "y": y(p.y),
                "low": y(p.low),
                "high": y(p.high),
                "dots": [y(dot) for dot in p.dots],
            }
            for p in line
        ]
    return {
        "series": laid,
        "x_ticks": [(x(value), f"{value:,g}") for value in apart(xs, x)],
        "y_ticks": [(y(value), f"{value:g}") for value in ticks(0, 100, 5)],
    }


def apart(values: Iterable[float], place: Callable[[float], float], gap: float = 34) -> list[float]:
    """Drop the values whose place is nearer than `gap` SVG units to the one kept before: their texts would overlap."""
    kept: list[float] = []
    for value in values:
        if not kept or place(value) - place(kept[-1]) >= gap:
            kept.append(value)
    return kept


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return about `wanted` ticks in [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    smallest = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(smallest))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= smallest)
    return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return the powers of ten in [low, high]; if they are few, 2 and 5 times them as well."""
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(exponents) <= 3 else (1,)
    return [value for e in exponents for m in factors if low <= (value := float(f"{m}e{e}")) <= high]


def shape(number: int, x: float, y: float, r: float) -> str:
    """Return the SVG path of a mark: circle, triangle, square, diamond or inverted triangle, all of about one size.

    With the ten colours of labels, the five shapes make fifty different marks.
    """
    i = max(number, 0)
    kind = (i + i // 10) % 5
    if kind == 0:
        return f"M{x - r:g} {y:g}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0"
    dx, dy = 1.2 * r, 1.4 * r
    if kind == 2:
        return f"M{x - 0.9 * r:g} {y - 0.9 * r:g}h{1.8 * r:g}v{1.8 * r:g}h{-1.8 * r:g}z"
    if kind == 3:
        return f"M{x:g} {y - dy:g}l{dx:g} {dy:g}l{-dx:g} {dy:g}l{-dx:g} {-dy:g}z"
    up = 1 if kind == 1 else -1
    return f"M{x:g} {y - 1.3 * r * up:g}l{dx:g} {2.2 * r * up:g}h{-2 * dx:g}z"
