"""Pictures inside a page as data: addresses: matrices in colour, thumbnails, sheets of thumbnails."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from barlow.core import images

DIVERGING = ("#1b4f9c", "#8fb4e0", "#ffffff", "#eba183", "#a8321a")  # spread evenly over -1 to 1
SHADES = ("#ffffff", "#8fb4e0", "#1b4f9c")  # spread evenly over 0 to 1


def matrix(values: np.ndarray[Any, Any], low: float, high: float, colors: Sequence[str]) -> str:
    """Draw a matrix, one pixel per entry, in `colors` spread evenly over low to high; return its address."""
    stops = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors])
    at = np.linspace(low, high, len(stops))
    channels = [np.interp(values, at, stops[:, channel]) for channel in range(3)]
    picture = Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))
    return address(images.encode(picture, "PNG", optimize=True), "png")


def thumbnail(pixels: images.Pixels, side: int = images.THUMBNAIL) -> str:
    """Return the address of an image (height, width, 3), shrunk if it is larger than `side`."""
    return address(images.jpeg(pixels, side))


def address(file: bytes, kind: str = "jpeg") -> str:
    """Return the `data:` address that holds an image file."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def sheet(pictures: Sequence[images.Pixels], tile: int) -> tuple[str, int]:
    """Put the pictures' centre squares side by side, `tile` px each; return the address and the number of columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    whole = Image.new("RGB", (columns * tile, math.ceil(len(pictures) / columns) * tile))
    for i, pixels in enumerate(pictures):
        square = ImageOps.fit(Image.fromarray(pixels), (tile, tile))
        whole.paste(square, (i % columns * tile, i // columns * tile))
    return address(images.encode(whole, "JPEG", quality=70, optimize=True)), columns
