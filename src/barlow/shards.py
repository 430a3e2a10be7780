"""The shard format: WebDataset tars, each with the index beside it that DALI reads, `<name>.tar` and `<name>.idx`.

A sample is two members, `<key>.<extension>` (an image file's bytes) and `<key>.cls` (its label, little-endian int32).
The index (DALI's `wds2idx`, v1.2) has a line for the count and one a sample: extension, offset, bytes and name of each
member; so any sample is one seek away, and the order, sizes and content (a key is a hash) are known without the images.
"""

from __future__ import annotations

import hashlib
import struct
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from barlow import files
from barlow.errors import UserError

EXTENSIONS = ("jpg", "png", "webp")  # of the images; DALI decodes these to the pixels of `images.decode`
CLASSES = "classes.json"
VERSION = "v1.2"


class Sample(NamedTuple):
    """An image file with its label."""

    key: str  # the first 24 hex digits of the SHA-256 of the file that was ingested
    data: bytes
    extension: str  # says the format of `data`
    label: int  # index into `classes`; -1: none


def write(path: Path, samples: Iterable[Sample]) -> None:
    """Write a tar and its index, each whole or not at all; the same samples give the same bytes."""
    lines = []
    with files.replacing(path) as temporary:
        with temporary.open("wb") as tar:
            for sample in samples:
                members = {sample.extension: sample.data, "cls": struct.pack("<i", sample.label)}
                lines.append(" ".join(_append(tar, sample.key, *member) for member in members.items()))
            tar.write(bytes(2 * tarfile.BLOCKSIZE))  # the end mark
        with files.replacing(index(path)) as temporary_index:
            temporary_index.write_text("\n".join([f"{VERSION} {len(lines)}", *lines]) + "\n")


def _append(tar: IO[bytes], key: str, extension: str, data: bytes) -> str:
    """Append a member; return its part of the index line."""
    info = tarfile.TarInfo(f"{key}.{extension}")  # time, user and group are 0
    info.size = len(data)
    tar.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = tar.tell()
    tar.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return f"{extension} {offset} {len(data)} {info.name}"


def read(tars: Iterable[Path]) -> Iterator[Sample]:
    """Yield every sample in its order.

    Raises:
        UserError: a tar or its index is missing, or the two do not fit.
    """
    for path in tars:
        lines = _index_lines(path)
        with path.open("rb") as tar:
            for line in lines:
                extension, offset, size, name, _, label_offset, *_ = line.split()
                tar.seek(int(offset))
                data = tar.read(int(size))
                tar.seek(int(label_offset))
                label = tar.read(4)
                if len(data) < int(size) or len(label) < 4:
                    raise UserError(f"{path} is shorter than {index(path).name} says; run `barlow shard` again")
                yield Sample(name.partition(".")[0], data, extension, struct.unpack("<i", label)[0])


def index(tar: Path) -> Path:
    """Return the path of a tar's index."""
    return tar.with_suffix(".idx")


def tars(split: str, folder: Path = files.SHARDS) -> list[Path]:
    """Return the tars of a split (pretrain, train, val or test) in order; none where the split has no images."""
    return sorted(folder.glob(f"{split}-*.tar"))


def count(tars: Iterable[Path]) -> int:
    """Return the number of samples, read from the indexes."""
    return sum(len(_index_lines(tar)) for tar in tars)


def digest(tars: Iterable[Path]) -> str:
    """Return a hash of the tars' names and content: the indexes hold the images' own hashes, sizes and order."""
    total = hashlib.sha256()
    for tar in tars:
        total.update(f"{tar.name} {files.sha256(index(tar))}\n".encode())
    return total.hexdigest()


def classes(folder: Path = files.SHARDS) -> list[str]:
    """Return the names that labels are indices of; empty where no image has a label."""
    names: list[str] = files.read_json(folder / CLASSES)
    return names


def _index_lines(tar: Path) -> list[str]:
    try:
        header, *lines = index(tar).read_text().splitlines() or [""]
    except FileNotFoundError:
        raise UserError(f"{index(tar)} is missing; run `barlow shard` again") from None
    if header != f"{VERSION} {len(lines)}":
        raise UserError(f"{index(tar)} is damaged: {len(lines)} samples after {header!r}; run `barlow shard` again")
    return lines
