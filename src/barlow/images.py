"""Decoding: any image file to 8-bit RGB, in one way for validation, packing, evaluation and serving."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def open_image(data: bytes) -> Image.Image:
    """Decode the whole of an image file (its first frame), with no warnings and no limit on pixels of its own.

    Raises:
        OSError, SyntaxError, ValueError: what Pillow says of a file that is no image or not a whole one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        image.load()
    return image


def to_rgb(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return uint8 (height, width, 3): EXIF orientation applied, 16 bits scaled to 8, alpha dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        wide = np.asarray(image, dtype=np.float32)
        image = Image.fromarray((wide / 257).clip(0, 255).round().astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def decode(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode an image file to uint8 (height, width, 3) RGB; raises as `open_image` does."""
    return to_rgb(open_image(data))
