"""The shard format: WebDataset tars, each with an index for DALI and the sizes of its images.

<split>-NNNNNN.tar    per sample two members: <key>.<extension>, the image file, and <key>.cls, the label (int32, little
                      endian). The key is a hash of the image.
<split>-NNNNNN.idx    the index of DALI's `wds2idx`, v1.2: the number of samples, then one line per sample with the
                      extension, offset, bytes and name of both members
<split>-NNNNNN.npy    height and width of each image in pixels, int32 (samples, 2)

With the index, any sample is one seek away, and the order and content of a tar are known without reading the tar.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import tarfile
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from barlow.core import bands, files
from barlow.core.errors import UserError

EXTENSIONS = ("jpg", "png", "webp", "npy")  # DALI decodes all but npy, to the pixels of `images.decode`
CLASSES_FILE = "classes.json"
VERSION = "v1.2"
OPEN_TARS = 256  # mapped at a time, at most
Indices = np.ndarray[Any, np.dtype[np.int64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Sides = np.ndarray[Any, np.dtype[np.int32]]


class Sample(NamedTuple):
    """An image file with its label."""

    key: str  # first 24 hex digits of the SHA-256 of the file that was ingested
    data: bytes
    extension: str  # tells the format of `data`; one of EXTENSIONS
    label: int  # index into `classes`; -1: none
    height: int  # px, of the decoded, upright image
    width: int


def write(path: Path, samples: Iterable[Sample]) -> None:
    """Write a tar, its index and its image sizes, each whole or not at all; the same samples give the same bytes."""
    lines, sides = [], []
    with files.replacing(path) as temporary:
        with temporary.open("wb") as tar:
            for sample in samples:
                members = {sample.extension: sample.data, "cls": struct.pack("<i", sample.label)}
                lines.append(" ".join(_append(tar, sample.key, *member) for member in members.items()))
                sides.append((sample.height, sample.width))
            tar.write(bytes(2 * tarfile.BLOCKSIZE))  # the end mark
        with files.replacing(index(path)) as temporary_index, files.replacing(_sides(path)) as temporary_sides:
            temporary_index.write_text("\n".join([f"{VERSION} {len(lines)}", *lines]) + "\n")
            with temporary_sides.open("wb") as file:
                np.save(file, np.array(sides, dtype=np.int32).reshape(-1, 2))


def _append(tar: IO[bytes], key: str, extension: str, data: bytes) -> str:
    """Append a member to a tar and return its part of the index line."""
    info = tarfile.TarInfo(f"{key}.{extension}")  # time, user and group are 0
    info.size = len(data)
    tar.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = tar.tell()
    tar.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return f"{extension} {offset} {len(data)} {info.name}"


def read(tars: Iterable[Path]) -> Iterator[Sample]:
    """Yield the samples of tars, in order.

    Raises:
        UserError: an index or its sizes are missing or damaged, or a tar is shorter than its index says.
    """
    for path in tars:
        lines = _index_lines(path)
        with path.open("rb") as tar:
            for line, (height, width) in zip(lines, _load_sides(path, len(lines)).tolist(), strict=True):
                extension, offset, size, name, _, label_offset, *_ = line.split()
                tar.seek(int(offset))
                data = tar.read(int(size))
                tar.seek(int(label_offset))
                label = tar.read(4)
                if len(data) < int(size) or len(label) < 4:
                    raise UserError(f"{path} is shorter than {index(path).name} says; run `barlow shard` again")
                yield Sample(name.partition(".")[0], data, extension, struct.unpack("<i", label)[0], height, width)


class Samples:
    """The image files in tars, by number: 0 to len() - 1, in the order of `read`. Tars are mapped, not loaded.

    Attributes:
        sides: heights and widths in pixels, int32 (len(), 2).

    Raises:
        UserError: an index or its sizes are missing or damaged.
    """

    def __init__(self, tars: list[Path]) -> None:
        lines = [_index_lines(tar) for tar in tars]
        fields = [line.split(" ", 6) for part in lines for line in part]
        spans = [(offset, size, label) for _, offset, size, _, _, label, _ in fields]
        self.sides = np.concatenate([np.empty((0, 2), np.int32), *map(_load_sides, tars, map(len, lines))])
        self._offsets, self._sizes, self._label_offsets = np.array(spans, dtype=np.int64).reshape(-1, 3).T
        self._tar = np.repeat(np.arange(len(tars)), [len(part) for part in lines])
        self._tars = tars
        self._arrays = bool(fields) and fields[0][0] == "npy"  # by the index: no tar is mapped yet
        self._mapped = lru_cache(OPEN_TARS)(self._map)

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def bytes(self) -> int:
        """The size of all image files together."""
        return int(self._sizes.sum())

    def read(self, numbers: Indices) -> list[Bytes]:
        """Return image files as uint8 arrays (bytes,), without copying.

        Raises:
            UserError: a tar is shorter than its index says.
        """
        return [np.frombuffer(self._mapped(tar), np.uint8, size, offset) for tar, offset, size in self._places(numbers)]

    @cached_property
    def form(self) -> bands.PixelFormat:
        """The channels and bits of all images, which are those of the first."""
        return bands.form_of(self.read(np.arange(1))[0]) if self._arrays else bands.RGB

    def stored(self, numbers: Indices) -> list[Any]:
        """Return images as DALI takes them: files as `read` does, or arrays (height, width, channels)."""
        read = self.read(numbers)
        return read if self.form == bands.RGB else [bands.unpack(data) for data in read]

    def labels(self) -> Indices:
        """Return the label of every image, int64 (len(),); -1 for none."""
        places = zip(self._tar.tolist(), self._label_offsets.tolist(), strict=True)
        return np.array([struct.unpack_from("<i", self._mapped(tar), offset)[0] for tar, offset in places], np.int64)

    def keys(self, numbers: Indices) -> list[str]:
        """Return the keys of images, which it reads from the indexes."""
        names = [line.split(" ", 4)[3] for tar in self._tars for line in _index_lines(tar)]
        return [names[i].partition(".")[0] for i in numbers]

    def prefetch(self, numbers: Indices) -> None:
        """Let the kernel read image files from the disk in the background; returns at once."""
        for tar, offset, size in self._places(numbers):
            start = offset - offset % mmap.PAGESIZE
            self._mapped(tar).madvise(mmap.MADV_WILLNEED, start, offset + size - start)

    def _places(self, numbers: Indices) -> Iterator[tuple[int, int, int]]:
        """Yield the tar's number, the offset and the bytes of each image file."""
        return zip(*(column[numbers].tolist() for column in (self._tar, self._offsets, self._sizes)), strict=True)

    def _map(self, tar: int) -> mmap.mmap:
        path, inside = self._tars[tar], self._tar == tar
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < (self._offsets[inside] + self._sizes[inside]).max():
                raise UserError(f"{path} is shorter than {index(path).name} says; run `barlow shard` again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def index(tar: Path) -> Path:
    """Return the path of a tar's index."""
    return tar.with_suffix(".idx")


def tars(split: str, folder: Path = files.SHARDS) -> list[Path]:
    """Return the tars of a split (pretrain, train, val or test), in order; none if the split has no images."""
    return sorted(folder.glob(f"{split}-*.tar"))


def count(tars: Iterable[Path]) -> int:
    """Return the number of samples in tars, by their indexes."""
    return sum(len(_index_lines(tar)) for tar in tars)


def digest(tars: Iterable[Path]) -> str:
    """Return a hash of the tars' names and indexes, which hold the hash, size and place of every image."""
    total = hashlib.sha256()
    for tar in tars:
        total.update(f"{tar.name} {files.sha256(index(tar))}\n".encode())
    return total.hexdigest()


def classes(folder: Path = files.SHARDS) -> list[str]:
    """Return the class names, of which a label is the index; empty if no image has a label."""
    names: list[str] = files.read_json(folder / CLASSES_FILE)
    return names


def sources() -> dict[str, str]:
    """Return the paths of the accepted images by their keys in the shards; none without data/accepted.parquet."""
    if not files.ACCEPTED.exists():
        return {}
    from pyarrow import parquet  # comes with the stage that wrote the file

    rows = parquet.read_table(files.ACCEPTED, columns=["path", "sha256"]).to_pydict()
    return {sha256[:24]: path for path, sha256 in zip(rows["path"], rows["sha256"], strict=True)}


def _sides(tar: Path) -> Path:
    return tar.with_suffix(".npy")


def _load_sides(tar: Path, count: int) -> Sides:
    files.require(_sides(tar), "shard")
    try:
        sides: Sides = np.load(_sides(tar), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{_sides(tar)} is damaged: {error}; run `barlow shard` again") from None
    if sides.shape != (count, 2) or sides.dtype != np.int32:
        got = f"{sides.dtype} of shape {sides.shape}"
        raise UserError(f"{_sides(tar)} is damaged: {got} for {count} samples; run `barlow shard` again")
    return sides


def _index_lines(tar: Path) -> list[str]:
    files.require(index(tar), "shard")
    header, *lines = index(tar).read_text().splitlines() or [""]
    if header != f"{VERSION} {len(lines)}":
        raise UserError(f"{index(tar)} is damaged: {len(lines)} samples after {header!r}; run `barlow shard` again")
    return lines
