"""What the report draws: curves laid out for SVG, matrices in colour, images as addresses that hold them whole."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

PLOT = (54, 8, 390, 160)  # left, top, right and bottom of a chart's plotted area, in SVG units
DIVERGING = ("#1b4f9c", "#8fb4e0", "#ffffff", "#eba183", "#a8321a")  # evenly over -1 to 1
SHADES = ("#ffffff", "#8fb4e0", "#1b4f9c")  # evenly over 0 to 1
THUMBNAIL = 160  # px, the longer side of an image that is shown

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def chart(values: Sequence[float], log: bool) -> dict[str, Any]:
    """Lay out a value an epoch: SVG points, and (place, text) of the ticks of both axes.

    The axis is linear from 0, or with `log` logarithmic over the values' range, if all are above 0.
    """
    left, top, right, bottom = PLOT
    log = log and min(values) > 0
    low, high = (min(values) if log else min(0.0, *values)), max(values)
    scaled = math.log if log else float
    height = (scaled(high) - scaled(low)) or 1.0
    marks = decades(low, high) if log and high > 8 * low else ticks(low, high, 4)

    def x(epoch: float) -> float:
        return round(left + (epoch - 1) / max(len(values) - 1, 1) * (right - left), 1)

    def y(value: float) -> float:
        return round(bottom - (scaled(value) - scaled(low)) / height * (bottom - top), 1)

    return {
        "points": [(x(epoch), y(value)) for epoch, value in enumerate(values, 1)],
        "x_ticks": [(x(epoch), f"{epoch:g}") for epoch in ticks(1, len(values), 8) if epoch == int(epoch)],
        "y_ticks": [(y(value), f"{value:.4g}") for value in marks],
        "log": log,
    }


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten in [low, high], at most about `wanted`."""
    if high <= low:
        return [low]
    smallest = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(smallest))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= smallest)
    return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return the powers of ten in [low, high], with 2 and 5 times them where there are few."""
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(exponents) <= 3 else (1,)
    return [value for e in exponents for m in factors if low <= (value := float(f"{m}e{e}")) <= high]


def matrix_picture(matrix: np.ndarray[Any, Any], low: float, high: float, colors: Sequence[str]) -> str:
    """Draw a matrix, a pixel an entry, in `colors` spread evenly over low to high; return its address."""
    stops = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors])
    at = np.linspace(low, high, len(stops))
    channels = [np.interp(matrix, at, stops[:, channel]) for channel in range(3)]
    return data_uri(Image.fromarray(np.stack(channels, -1).round().astype(np.uint8)), "PNG", optimize=True)


def thumbnail(pixels: Pixels) -> str:
    """Return the address of an image (height, width, 3), shrunk where it is large."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(image, "JPEG", quality=88, subsampling=0)


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """Return a `data:` address, which holds the encoded image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
