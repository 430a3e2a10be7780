"""TIFF files of several channels, with 8 or 16 bits per value.

Pillow opens few of them. So the directory of such a file is rewritten: the image is described as a grey one with all
samples side by side, or as one grey image per channel. Pillow's libtiff then reads these.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from barlow.core import images
from barlow.core.images import TURNS, TooManyPixelsError

Pixels = np.ndarray[Any, np.dtype[Any]]  # (height, width, channels), uint8 or uint16
ORDER = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<"}  # byte order; with + the offsets have 64 bits
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES = 256, 257, 258, 259, 262, 274, 277
PREDICTOR, TILE_WIDTH, PLANAR, SAMPLE_FORMAT = 317, 322, 284, 339
PARTS = ((273, 279), (324, 325))  # offsets and sizes of the strips, and of the tiles
KEPT = (WIDTH, HEIGHT, COMPRESSION, 266, 278, PREDICTOR, TILE_WIDTH, 323, *PARTS[0], *PARTS[1])  # tags for Pillow
PREDICTED = (5, 8, 32946, 34925, 50000)  # LZW, deflate (two numbers), LZMA and zstd may store differences
MISMATCH = "where model.channels="  # in the error of `check_channels`
COMPRESSIONS = (1, 32773, *PREDICTED)  # none and PackBits besides; JPEG would mix the channels


class Stored(NamedTuple):
    """An image as it is stored, before it is made upright."""

    pixels: Pixels
    orientation: int  # EXIF, 1 to 8


def read(data: bytes, channels: int, max_pixels: int | None) -> Stored | None:
    """Read a TIFF whose first page has several samples, or whose pages are the channels; None if Pillow is to read it.

    Raises:
        ValueError: it has another number of channels, or values or a compression that are not read.
        Exception: of any kind, for a damaged file.
    """
    pages = list(_pages(data, channels + 1))
    if not pages:
        raise ValueError("a TIFF without a page")
    first = pages[0]
    samples = int(first.get(SAMPLES, 1))
    if channels == 3 and (samples == 1 or set(first.get(BITS, (1,))) == {8}):
        return None
    if samples > 1:
        pages = pages[:1]
    colour = channels == 3 and samples == 4 and first.get(PHOTOMETRIC) == 2
    check_channels(3 if colour else samples * len(pages), channels)
    for page in pages:
        _check_page(page, first, max_pixels)
    parts = [_read_page(data, page, samples) for page in pages]
    pixels = (parts[0] if samples > 1 else np.concatenate(parts, axis=2))[:, :, :channels]
    orientation = int(first.get(ORIENTATION, 1))
    return Stored(pixels, orientation if orientation in TURNS else 1)


def check(data: bytes, channels: int) -> None:
    """Raise ValueError if a file is a TIFF with another number of channels; Pillow only says that it is unknown."""
    try:
        (page,) = _pages(data, 1)
        samples = int(page.get(SAMPLES, 1))
    except Exception:  # a damaged TIFF, or another file
        return
    check_channels(samples, channels)


def _pages(data: bytes, most: int) -> Iterator[dict[int, Any]]:
    """Yield the tags of the first `most` pages."""
    file = io.BytesIO(data)
    header = data[:16] if data[2:3] == b"+" else data[:8]
    directory = ImageFileDirectory_v2(header)
    while directory.next and most:
        file.seek(directory.next)
        directory.load(file)
        yield dict(directory)
        most -= 1


def _check_page(page: dict[int, Any], first: dict[int, Any], max_pixels: int | None) -> None:
    width, height = int(page.get(WIDTH, 0)), int(page.get(HEIGHT, 0))
    if max_pixels is not None and width * height > max_pixels:
        raise TooManyPixelsError(f"{width} x {height} pixels, more than the {max_pixels} allowed")
    if min(width, height) < 1 or (width, height) != (first[WIDTH], first[HEIGHT]):
        raise ValueError("a TIFF whose pages have different sizes, or none")
    bits, kinds = set(page.get(BITS, (1,))), set(page.get(SAMPLE_FORMAT, (1,)))
    if bits not in ({8}, {16}) or kinds != {1}:
        raise ValueError(
            f"a TIFF with values of {sorted(bits)} bits, sample format {sorted(kinds)}; save uint8 or uint16"
        )
    if page.get(COMPRESSION, 1) not in COMPRESSIONS or page.get(PREDICTOR, 1) not in (1, 2):
        raise ValueError(f"a TIFF of several channels with compression {page.get(COMPRESSION)}; use deflate or LZW")


def _read_page(data: bytes, page: dict[int, Any], samples: int) -> Pixels:
    """Return a page of a TIFF as (height, width, samples)."""
    tags = {tag: page[tag] for tag in KEPT if tag in page}
    tags |= {BITS: page[BITS][0], PHOTOMETRIC: 1, SAMPLES: 1}
    width = int(page[WIDTH])
    if page.get(PLANAR, 1) == 2:
        planes = []
        for i in range(samples):
            part = {tag: _share(page[tag], i, samples) for pair in PARTS for tag in pair if tag in page}
            planes.append(_read_grey(data, tags | part))
        return np.stack(planes, axis=2)
    step = width
    if TILE_WIDTH in tags:
        step = int(tags[TILE_WIDTH])
        tags[TILE_WIDTH] = step * samples
    differences = tags.get(COMPRESSION, 1) in PREDICTED and tags.pop(PREDICTOR, 1) == 2  # between equal channels
    pixels = _read_grey(data, tags | {WIDTH: width * samples}).reshape(int(page[HEIGHT]), width, samples)
    if not differences:
        return pixels
    tiles = [pixels[:, start : start + step] for start in range(0, width, step)]
    return np.concatenate([tile.cumsum(axis=1, dtype=pixels.dtype) for tile in tiles], axis=1)


def _share(values: Any, i: int, n: int) -> Any:
    """Return the i-th of n equal parts of a tag's values."""
    part = len(values) // n
    return values[i * part : (i + 1) * part]


def _read_grey(data: bytes, tags: dict[int, Any]) -> Pixels:
    """Decode with Pillow the image (height, width) that the tags describe; its strips or tiles lie in `data`."""
    order = ORDER[data[:4]]
    entries, beyond = b"", b""
    place = len(data) + len(data) % 2
    after = place + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        values = [int(number) for number in (value if isinstance(value, tuple) else (value,))]
        packed = struct.pack(f"{order}{len(values)}L", *values)
        if len(values) > 1:
            beyond, packed = beyond + packed, struct.pack(f"{order}L", after + len(beyond))
        entries += struct.pack(f"{order}HHL", tag, 4, len(values)) + packed
    start = data[:2] + struct.pack(f"{order}HL", 42, place)
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + beyond
    image = images.open_image(start + data[8:].ljust(place - 8, b"\0") + directory, None, ("TIFF",))
    pixels = np.asarray(image)
    return pixels.astype(pixels.dtype.newbyteorder("="))


def check_channels(found: int, wanted: int) -> None:
    """Raise ValueError if an image has another number of channels than wanted."""
    if found != wanted:
        raise ValueError(f"{found} channel{'s' * (found > 1)} {MISMATCH}{wanted} is expected")
