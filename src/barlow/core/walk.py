"""Find the image files in a folder, by one set of rules for all commands.

Hidden files and files that are no images are left out. Each link to a folder is followed once.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# Images by their suffix, unread: the formats that are decoded, and others, so that validate refuses those by name.
SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
     ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".jxr", ".svg", ".eps", ".psd", ".ico", ".icns", ".tga",
     ".pcx", ".dds", ".exr", ".xcf", ".ppm", ".pgm", ".pbm", ".pnm",
     ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"]
)  # fmt: skip
STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
HEIF = (b"hei", b"hev", b"mif", b"msf", b"avi")  # first letters of the brands of HEIC and AVIF
SHOWN = 6  # kinds of files in a note
Identity = tuple[int, int]  # device and inode


class File(NamedTuple):
    """A file below a folder."""

    parts: tuple[str, ...]  # of its path, relative to the folder
    status: os.stat_result | None  # of a link's target; None for a broken link or a file that is gone


@dataclass
class LeftOut:
    """Counts of what `walk` leaves out."""

    hidden: int = 0
    loops: int = 0
    others: Counter[str] = field(default_factory=Counter)  # files that are no images, by suffix or, without one, name

    def notes(self) -> list[str]:
        """Return one line per reason."""
        notes = []
        if self.others:
            kinds = [f"{kind} {count}" for kind, count in self.others.most_common(SHOWN)]
            kinds += [f"{len(self.others) - SHOWN} more kinds"] if len(self.others) > SHOWN else []
            plural = "files that are no images" if self.others.total() > 1 else "file that is no image"
            notes.append(f"left out: {self.others.total()} {plural}: {', '.join(kinds)}")
        if self.hidden:
            notes.append(f"left out: hidden files or folders: {self.hidden}")
        if self.loops:
            notes.append(f"left out: links back to a folder above, or to a folder a second time: {self.loops}")
        return notes


def walk(root: Path, left_out: LeftOut, keep: str = "") -> Iterator[File]:
    """Yield the image files below a folder, level by level, sorted by name within a folder; count the others.

    A link never leads back to a folder that contains the link. So loops of links end.
    A folder that cannot be opened is yielded itself, as a file without a status.

    Args:
        root: the folder.
        left_out: receives the counts.
        keep: name of a hidden file that does not count as left out.
    """
    above = frozenset(_identity(folder.stat()) for folder in (root.resolve(), *root.resolve().parents))
    followed: set[Identity] = set()
    folders: list[tuple[tuple[str, ...], frozenset[Identity]]] = [((), above)]
    for parts, above in folders:  # the loop appends to the list, so it goes level by level
        for name, status, link in _entries(root.joinpath(*parts)):
            if name.startswith(".") or name == "__MACOSX":  # the latter holds a Mac's metadata in ZIP archives
                left_out.hidden += name != keep
            elif name and status and stat.S_ISDIR(status.st_mode):
                if _identity(status) in above or link in followed:
                    left_out.loops += 1
                    continue
                folders.append(((*parts, name), above | {_identity(status)}))
                followed |= {link} if link else set()
            elif not name:
                yield File(parts, None)
            elif is_image(root.joinpath(*parts, name), status):
                yield File((*parts, name), status)
            else:
                left_out.others[os.path.splitext(name)[1].lower() or name] += 1  # noqa: PTH122 (fast)


def is_image(path: Path, status: os.stat_result | None) -> bool:
    """Tell whether a file is an image by its suffix or, if the suffix is not an image's, by its first bytes.

    A file without a suffix that cannot be read counts as an image, so that it is reported and not passed over.
    """
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return True
    if status is None:
        return not suffix
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
        return False
    try:
        with path.open("rb") as file:
            return _starts_like_an_image(file.read(16))
    except OSError:
        return not suffix


def read(path: Path | str) -> bytes:
    """Return a file's content.

    Raises:
        OSError: it cannot be read, or it is a folder, a pipe or a device, which could block the reader.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 (also takes text)
        raise OSError(0, "not a regular file")
    return Path(path).read_bytes()


def readable(name: str) -> str:
    """Return a file name with the bytes that are not UTF-8 spelled out, like \\xe9."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _starts_like_an_image(start: bytes) -> bool:
    webp, heif = start[:4] == b"RIFF" and start[8:12] == b"WEBP", start[4:8] == b"ftyp" and start[8:11] in HEIF
    bmp = start[:2] == b"BM" and start[6:10] == bytes(4)  # a text may start with BM, but has no zeros
    return start.startswith(STARTS) or webp or heif or bmp


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result | None, Identity | None]]:
    """Yield the name, the status and, for a link, the identity of the link of each entry, sorted by name.

    The status of a link is that of its target; it is None for a broken link or a file that is gone.
    A folder that cannot be opened yields one entry without a name.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield "", None, None
        return
    for entry in entries:
        try:
            link = _identity(entry.stat(follow_symlinks=False)) if entry.is_symlink() else None
            yield entry.name, entry.stat(), link
        except OSError:  # a broken link, a ring of links, a file just removed
            yield entry.name, None, None


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino
