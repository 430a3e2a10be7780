"""Images of any number of channels, with 8 or 16 bits: decoded, kept in shards, shown.

`model.channels: 3` with `model.bits: 8` is what `images.decode` gives. All other images are kept in shards as arrays in
NumPy's .npy format, since DALI and Pillow do not agree on such files, or cannot read them.
"""

from __future__ import annotations

import io
import re
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from barlow.core import images, tiff
from barlow.core.images import FORMATS, UnknownFormatError

Pixels = np.ndarray[Any, np.dtype[Any]]  # (height, width, channels), uint8 or uint16
MULTIBAND = "MULTIBAND"  # the mode of an image that Pillow has no name for
GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
NPY = b"\x93NUMPY"
HEADER = re.compile(  # as np.save writes it for `pack`
    re.escape(NPY) + rb"\x01\x00..\{'descr': '([<|]u[12])', 'fortran_order': False, 'shape': \((\d+), (\d+), (\d+)\), ",
    re.DOTALL,
)
PNG = b"\x89PNG\r\n\x1a\n"


class PixelFormat(NamedTuple):
    """How images are decoded: `model.channels` and `model.bits`."""

    channels: int = 3
    bits: int = 8

    @property
    def white(self) -> int:
        """The largest value: 255 or 65535."""
        return int(2**self.bits - 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or uint16."""
        return np.dtype(f"uint{self.bits}")

    def __str__(self) -> str:
        return f"uint{self.bits} [height, width, {self.channels}]"


RGB = PixelFormat()


class Decoded(NamedTuple):
    """A decoded image, upright, with what its file says."""

    pixels: Pixels
    width: int  # px, as stored: before the orientation is applied
    height: int
    mode: str  # by Pillow's names, or MULTIBAND
    format: str
    orientation: int


def decode(
    data: bytes, form: PixelFormat = RGB, max_pixels: int | None = None, formats: tuple[str, ...] = FORMATS
) -> Pixels:
    """Decode an image file to (height, width, channels), upright; values of another depth are scaled.

    Raises:
        ValueError: as `images.open_image`, or the image has another number of channels.
    """
    return read(data, form, max_pixels, formats).pixels


def read(data: bytes, form: PixelFormat, max_pixels: int | None, formats: tuple[str, ...]) -> Decoded:
    """Decode an image file as `decode` does, and return what else there is to know about it."""
    if form != RGB and form.channels > 1 and "TIFF" in formats and data[:4] in tiff.ORDER:
        with images.reasons():
            page = tiff.read(data, form.channels, max_pixels)
        if page:
            upright = _turned(scaled(page.pixels, form.bits), page.orientation)
            height, width = page.pixels.shape[:2]
            return Decoded(upright, width, height, MULTIBAND, "TIFF", page.orientation)
    if form.bits == 16 and data.startswith(PNG) and data[24:25] == b"\x10" and data[25:26] != b"\0":
        raise ValueError("a PNG with 16 bits and several channels, of which Pillow reads 8 bits; save it as TIFF")
    try:
        image = images.open_image(data, max_pixels, formats)
    except UnknownFormatError:
        if "TIFF" in formats:
            tiff.check(data, form.channels)
        raise
    facts = (image.width, image.height, image.mode, image.format or "", images.orientation(image))
    return Decoded(of_image(image, form), *facts)


def of_image(image: Image.Image, form: PixelFormat = RGB) -> Pixels:
    """Return a Pillow image as (height, width, channels), upright. To 1 and 3 channels, alpha is dropped.

    Raises:
        ValueError: the image has another number of channels, or nothing says how to scale its values.
    """
    if form == RGB:
        return images.to_rgb(image)
    grey = image.mode in GREY
    if grey and form.channels in (1, 3):
        pixels = np.repeat(_grey(image, form.bits)[:, :, None], form.channels, axis=2)
        return _turned(pixels, images.orientation(image))
    if form.channels == 3:
        return scaled(images.to_rgb(image), form.bits)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    pixels = np.atleast_3d(np.asarray(image))
    tiff.check_channels(pixels.shape[2], form.channels)
    return scaled(_turned(pixels, images.orientation(image)), form.bits)


def _grey(image: Image.Image, bits: int) -> Pixels:
    """Return the values of a grey image (height, width), scaled as `images.to_rgb` scales them."""
    if image.mode in ("1", "L", "LA", "La"):
        return scaled(np.asarray(image.convert("L")), bits)
    wide = np.asarray(image)
    if image.mode.startswith("I;16"):
        return scaled(wide.astype(np.uint16), bits)
    low, high = wide.min(), wide.max()
    if bits == 8 or not (low >= 0 and high <= 65535):
        return images.to_8_bits(image)  # which says what is wrong
    factor = 65535 if image.mode == "F" and high <= 1 else 257 if high <= 255 else 1
    sixteen: Pixels = (wide.astype(np.float64) * factor).round().astype(np.uint16)
    return sixteen


def scaled(pixels: Pixels, bits: int) -> Pixels:
    """Return pixels with 8 or 16 bits per value: white stays white."""
    if pixels.dtype.itemsize * 8 == bits:
        return pixels
    wide = pixels.astype(np.uint16) * np.uint16(257) if bits == 16 else (pixels.astype(np.float32) / 257).round()
    other: Pixels = wide.astype(f"uint{bits}")
    return other


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Make an image (height, width, channels) upright by its EXIF orientation."""
    pixels = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels
    down, across = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if down else 1, :: -1 if across else 1])


def pack(pixels: Pixels) -> bytes:
    """Return an image as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pixels), allow_pickle=False)
    return buffer.getvalue()


def unpack(data: Any) -> Pixels:
    """Return the pixels of an image in a shard: an array (bytes of .npy), or a file that `images.decode` decodes."""
    if bytes(data[:6]) != NPY:
        return images.decode(bytes(data))
    # Not by np.load: its ast.literal_eval fails at times in threads of Python 3.11 (python/cpython#106905).
    header = HEADER.match(bytes(data[:256]))
    if header is None:
        raise ValueError("an array in a shard that `barlow shard` did not write; run `dvc repro shard` again")
    start = 10 + int.from_bytes(bytes(data[8:10]), "little")
    shape = [int(side) for side in header.groups()[1:]]
    pixels: Pixels = np.frombuffer(data, header[1].decode(), offset=start).reshape(shape).copy()
    return pixels


def form_of(data: Any) -> PixelFormat:
    """Return the format of an image in a shard."""
    if bytes(data[:6]) != NPY:
        return RGB
    pixels = unpack(data)
    return PixelFormat(pixels.shape[2], 8 * pixels.dtype.itemsize)


def shrunk(pixels: Pixels, max_side: int) -> Pixels:
    """Return an image whose longer side has at most `max_side` pixels (Lanczos, each channel by itself)."""
    height, width, channels = pixels.shape
    factor = min(1.0, max_side / max(height, width))
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    planes = [Image.fromarray(pixels[:, :, i].astype(np.float32)) for i in range(channels)]
    small = np.stack([np.asarray(plane.resize(size, Image.Resampling.LANCZOS)) for plane in planes], axis=2)
    rounded: Pixels = small.round().clip(0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)
    return rounded


def resized(pixels: Pixels, width: int, height: int) -> Pixels:
    """Return an image of another size: of 8-bit RGB by Pillow's cubic filter, else of the nearest pixels."""
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize((width, height)))
    rows, columns = (np.arange(n) * old // n for n, old in zip((height, width), pixels.shape[:2], strict=True))
    nearest: Pixels = pixels[rows[:, None], columns]
    return nearest


def preview(pixels: Pixels) -> images.Pixels:
    """Return uint8 (..., height, width, 3) to look at: the first three channels, or the first one as grey."""
    eight = scaled(pixels, 8)
    channels = eight.shape[-1]
    return eight if channels == 3 else np.ascontiguousarray(eight[..., [0, 1, 2] if channels > 3 else [0, 0, 0]])


def noise(n: int, side: int, form: PixelFormat) -> Pixels:
    """Return n random images (n, side, side, channels), to try an encoder with; always the same."""
    return np.random.default_rng(0).integers(0, form.white + 1, (n, side, side, form.channels), dtype=form.dtype)
