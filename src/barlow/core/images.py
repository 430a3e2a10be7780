"""Decoding: any image file to 8-bit RGB, in one way for validation, packing, evaluation and serving."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# What is decoded, as Pillow names it. Of its other formats some take gigabytes whatever their header says; EPS is run.
FORMATS = ("BMP", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
INGESTED = (*FORMATS, "GIF")  # what `validate.formats` may name
THUMBNAIL = 96  # px, the longer side
SALVAGED_PIXELS = 100_000_000  # of an image to salvage: 300 MB decoded

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (height, width, 3)


class TooManyPixelsError(ValueError):
    """The file's header announces more pixels than the caller allows; nothing was decoded."""


class UnknownFormatError(ValueError):
    """The file is no image, or one of a kind that is not known."""


def open_image(data: bytes, max_pixels: int | None = None, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decode the whole of an image file (its first frame), with no warnings.

    Raises:
        TooManyPixelsError: by the header, before anything is decoded.
        UnknownFormatError: the file is no image, or in none of `formats`; its header is not read then.
        ValueError: it is not a whole one; the message is the reason, without the file's name.
    """
    # Not catch_warnings: it is not thread-safe and would leave every warning of the process off.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, a constant, would overrule `max_pixels`
    Image.init()  # each thread's first call waits here until all formats are known
    with _reasons():
        try:
            # Pillow opens MPO, many JPEGs in one file, as JPEG, and has no plugin of that name.
            image = Image.open(io.BytesIO(data), formats=[name for name in formats if name != "MPO"])
        except UnidentifiedImageError:  # its own text holds a memory address
            raise UnknownFormatError(_unknown(data[:16].ljust(16), formats)) from None
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise TooManyPixelsError(f"{image.width} x {image.height} pixels, more than the {max_pixels} allowed")
        image.load()
    return image


def _unknown(start: bytes, formats: tuple[str, ...]) -> str:
    """Say what a file that begins like this is, if it looks like something that Pillow knows."""
    for name, (_, accept) in Image.OPEN.items():
        if accept and name not in formats and accept(start) is True:
            return f"format {name}; decoded are {', '.join(formats)}"
    return "not an image in a known format"


def to_rgb(image: Image.Image) -> Pixels:
    """Return uint8 (height, width, 3): EXIF orientation applied, 16 bits scaled to 8, alpha dropped.

    Raises:
        ValueError: the image has a broken EXIF block or a mode without a conversion.
    """
    with _reasons():
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            wide = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((wide / 257).clip(0, 255).round().astype(np.uint8))
        return np.asarray(image.convert("RGB"))


def decode(data: bytes, max_pixels: int | None = None, formats: tuple[str, ...] = FORMATS) -> Pixels:
    """Decode an image file to uint8 (height, width, 3) RGB; raises as `open_image` does."""
    return to_rgb(open_image(data, max_pixels, formats))


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    """Return an image as a file of a format, as Pillow names it, with options of Pillow's `save`."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(pixels: Pixels, side: int = THUMBNAIL) -> bytes:
    """Return the JPEG file of an image (height, width, 3), shrunk where its longer side is above `side` px."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return encode(image, "JPEG", quality=85, subsampling=0)


def salvage(data: bytes) -> Pixels:
    """Decode what can be decoded of an image file, even of one that is cut short.

    Raises:
        ValueError: there is nothing to see in it.
    """
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        pixels = decode(data, SALVAGED_PIXELS, INGESTED)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    if pixels.size == 0 or pixels.min() == pixels.max():
        raise ValueError("nothing to see")
    return pixels


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever Pillow raises (OSError, SyntaxError, struct.error, ...) into a ValueError of one line."""
    try:
        yield
    except (TooManyPixelsError, UnknownFormatError):
        raise
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
