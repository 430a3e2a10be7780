"""Decode any image file to 8-bit RGB, in one way for all stages and the service; encode images as files."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

# The formats that are decoded, by Pillow's names. Other formats are a risk: some take gigabytes whatever their header
# says, and an EPS file is a program that would be run.
FORMATS = ("BMP", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
INGESTED = (*FORMATS, "GIF")  # what `validate.formats` may name
THUMBNAIL = 96  # px, the longer side
SALVAGED_PIXELS = 100_000_000  # at most, of an image to salvage: 300 MB decoded
ORIENTATION = 0x0112  # the EXIF tag
# What makes an image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (height, width, 3)


class TooManyPixelsError(ValueError):
    """The file's header says that there are more pixels than the caller allows; nothing was decoded."""


class UnknownFormatError(ValueError):
    """The file is not an image, or its format is not allowed."""


def open_image(data: bytes, max_pixels: int | None = None, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decode the first frame of an image file, with no warnings.

    Raises:
        TooManyPixelsError: the header says more than `max_pixels`; nothing was decoded.
        UnknownFormatError: the file is not an image in one of `formats`; its header was not read.
        ValueError: the image is damaged; the message is the reason, without the file's name.
    """
    # Not catch_warnings: it is not thread-safe, and could switch off all warnings of the process for good.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, a constant, would overrule `max_pixels`
    Image.init()  # so that no thread goes on before all formats are known
    with reasons():
        try:
            # Pillow opens MPO, many JPEGs in one file, as JPEG, and has no plugin of that name.
            image = Image.open(io.BytesIO(data), formats=[name for name in formats if name != "MPO"])
        except UnidentifiedImageError:  # whose message has a memory address
            raise UnknownFormatError(_unknown(data[:16].ljust(16), formats)) from None
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise TooManyPixelsError(f"{image.width} x {image.height} pixels, more than the {max_pixels} allowed")
        image.load()
    return image


def _unknown(start: bytes, formats: tuple[str, ...]) -> str:
    """Name the format of a file by its first 16 bytes, if it is one that Pillow knows."""
    for name, (_, accept) in Image.OPEN.items():
        if accept and name not in formats and accept(start) is True:
            return f"format {name}; decoded are {', '.join(formats)}"
    return "not an image in a known format"


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or the EXIF block is broken: it refuses no picture."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # of a broken block: struct.error, SyntaxError, ...
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def to_rgb(image: Image.Image) -> Pixels:
    """Return uint8 (height, width, 3): upright by its EXIF orientation, wider values scaled to 8 bits, alpha dropped.

    Raises:
        ValueError: Pillow cannot convert the image's mode, or nothing says how to scale its values.
    """
    with reasons():
        turn = TURNS.get(orientation(image))
        image = image if turn is None else image.transpose(turn)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = Image.fromarray(to_8_bits(image))
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def to_8_bits(image: Image.Image) -> Pixels:
    """Scale the values of a grey image (height, width) to 0 to 255.

    16-bit values are divided by 257, however dark. Modes I (32 bits) and F (float) do not say which value is white: F
    within 0..1 is multiplied by 255, both within 0..255 stay, and both within 0..65535 are divided by 257.

    Raises:
        ValueError: the values of mode I or F lie in none of these ranges.
    """
    wide = np.asarray(image)
    if image.mode in ("I", "F"):
        low, high = wide.min(), wide.max()
        if not (low >= 0 and high <= 65535):  # NaN is neither
            kind = "float" if image.mode == "F" else "32-bit"
            raise ValueError(f"{kind} values from {low:g} to {high:g}: save the image with 8 or 16 bits")
        if image.mode == "F" and high <= 1:
            wide = wide * 255
        elif high > 255:
            wide = wide / 257
    else:
        wide = wide.astype(np.float32) / 257
    scaled: Pixels = wide.round().astype(np.uint8)
    return scaled


def digest(pixels: Pixels) -> int:
    """Return a number that tells pixels (height, width, 3) apart: the CRC-32 of their shape and values.

    It compares two decoders' results on one file. So 32 bits are enough, and the fastest hash will do.
    """
    return zlib.crc32(np.ascontiguousarray(pixels).data, zlib.crc32(repr(pixels.shape).encode()))


def decode(data: bytes, max_pixels: int | None = None, formats: tuple[str, ...] = FORMATS) -> Pixels:
    """Decode an image file to uint8 (height, width, 3) RGB; raises as `open_image` does."""
    return to_rgb(open_image(data, max_pixels, formats))


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    """Return an image as the bytes of a file in a format of Pillow, with options of Pillow's `save`."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(pixels: Pixels, side: int = THUMBNAIL) -> bytes:
    """Return an image (height, width, 3) as a JPEG file, shrunk if its longer side exceeds `side` px."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return encode(image, "JPEG", quality=85, subsampling=0)


def salvage(data: bytes) -> Pixels:
    """Decode as much of an image file as possible, even if it is cut short.

    Raises:
        ValueError: nothing could be decoded, or all of it has one value.
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
def reasons() -> Iterator[None]:
    """Turn any error of Pillow (OSError, SyntaxError, struct.error, ...) into a ValueError of one line."""
    try:
        yield
    except (TooManyPixelsError, UnknownFormatError):
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        # libtiff's errors are numbers
        raise ValueError(f"damaged or truncated ({text})" if text.startswith("decoder error") else text) from error
