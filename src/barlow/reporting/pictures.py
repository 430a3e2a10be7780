"""Pictures that a page holds whole: matrices in colour, thumbnails, many thumbnails as one sheet."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from barlow.core import images

DIVERGING = ("#1b4f9c", "#8fb4e0", "#ffffff", "#eba183", "#a8321a")  # evenly over -1 to 1
SHADES = ("#ffffff", "#8fb4e0", "#1b4f9c")  # evenly over 0 to 1
SIDE = 96  # px, the longer side of a thumbnail
MAX_PIXELS = 100_000_000  # of an image to salvage: 300 MB decoded

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def matrix(values: np.ndarray[Any, Any], low: float, high: float, colors: Sequence[str]) -> str:
    """Draw a matrix, a pixel an entry, in `colors` spread evenly over low to high; return its address."""
    stops = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors])
    at = np.linspace(low, high, len(stops))
    channels = [np.interp(values, at, stops[:, channel]) for channel in range(3)]
    picture = Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))
    return address(_encoded(picture, "PNG", optimize=True), "png")


def thumbnail(pixels: Pixels, side: int = SIDE) -> str:
    """Return the address of an image (height, width, 3), shrunk where it is larger than `side`."""
    return address(jpeg(pixels, side))


def jpeg(pixels: Pixels, side: int = SIDE) -> bytes:
    """Return the file of an image (height, width, 3), shrunk where it is larger than `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return _encoded(image, "JPEG", quality=85, subsampling=0)


def address(file: bytes, kind: str = "jpeg") -> str:
    """Return the `data:` address that holds an image file."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def sheet(pictures: Sequence[Pixels], tile: int) -> tuple[str, int]:
    """Put pictures side by side as squares of `tile` px, cut to their middle; return the address and the columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    whole = Image.new("RGB", (columns * tile, math.ceil(len(pictures) / columns) * tile))
    for i, pixels in enumerate(pictures):
        square = ImageOps.fit(Image.fromarray(pixels), (tile, tile))
        whole.paste(square, (i % columns * tile, i // columns * tile))
    return address(_encoded(whole, "JPEG", quality=70, optimize=True)), columns


def salvage(data: bytes) -> Pixels:
    """Decode what can be decoded of an image file, be it cut short.

    Raises:
        ValueError: there is nothing to see in it.
    """
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        pixels = images.decode(data, MAX_PIXELS, images.INGESTED)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    if pixels.size == 0 or pixels.min() == pixels.max():
        raise ValueError("nothing to see")
    return pixels


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
