"""Image files on disk: find them in folders, and decode them in threads a few files ahead of the caller."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from barlow.core.bands import RGB, PixelFormat, Pixels, decode
from barlow.core.walk import LeftOut, read, walk
from barlow.encoder.encoder import MAX_PIXELS


def find(paths: Iterable[Path | str]) -> Iterator[str]:
    """Yield the paths of files as given and, for a folder, of the images below, by the rules of `barlow ingest`."""
    for path in paths:
        if Path(path).is_dir():
            for file in walk(Path(path), LeftOut()):
                yield "/".join((os.fspath(path).rstrip("/"), *file.parts))
        else:
            yield os.fspath(path)


def read_ahead(paths: Iterable[str], threads: int, form: PixelFormat = RGB) -> Iterator[tuple[str, Pixels | str]]:
    """Yield (path, pixels or the reason why there are none) in order; threads decode a few files ahead."""
    pending: deque[tuple[str, Future[Pixels | str]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for path in paths:
            pending.append((path, pool.submit(_read, path, form)))
            if len(pending) > 2 * threads:
                done, future = pending.popleft()
                yield done, future.result()
        for path, future in pending:
            yield path, future.result()


def _read(path: str, form: PixelFormat) -> Pixels | str:
    try:
        return decode(read(path), form, MAX_PIXELS)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
