"""Image files on disk: find them in folders, and decode them in threads a few files ahead of the caller."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from barlow.core.images import decode
from barlow.encoder.encoder import MAX_PIXELS, Pixels


def find(paths: Iterable[Path | str]) -> Iterator[str]:
    """Yield the paths of files as given and, for a folder, of all files below with an image's suffix, sorted."""
    suffixes = Image.registered_extensions()
    for path in paths:
        if not Path(path).is_dir():
            yield os.fspath(path)
        for folder, folders, names in os.walk(path):  # does not follow links to folders, which may loop
            folders.sort()
            yield from (f"{folder}/{name}" for name in sorted(names) if Path(name).suffix.lower() in suffixes)


def read_ahead(paths: Iterable[str], threads: int) -> Iterator[tuple[str, Pixels | str]]:
    """Yield (path, pixels or the reason why there are none) in order; threads decode a few files ahead."""
    pending: deque[tuple[str, Future[Pixels | str]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for path in paths:
            pending.append((path, pool.submit(_read, path)))
            if len(pending) > 2 * threads:
                done, future = pending.popleft()
                yield done, future.result()
        for path, future in pending:
            yield path, future.result()


def _read(path: str) -> Pixels | str:
    try:
        return decode(Path(path).read_bytes(), MAX_PIXELS)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
