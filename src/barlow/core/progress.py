"""Progress of whatever takes long: a bar in a terminal, else one line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

SECONDS = 10  # between two lines where there is no terminal
Item = TypeVar("Item")


class Progress:
    """A count of what is done, out of `total` if that is known; `with Progress(...) as progress: progress.update()`."""

    _last = time.monotonic()  # of the last line; shared, so that many short ones print every ten seconds too

    def __init__(self, what: str, total: int | None = None, unit: str = "image") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._count = 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm  # here, so that a bare machine can do without it

            self._bar = tqdm(desc=what, total=total, unit=unit, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1) -> None:
        """Count `count` more."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - Progress._last > SECONDS:
            Progress._last = time.monotonic()
            print(f"{self._what}: {self._unit} {self._count}{f' of {self._total}' if self._total else ''}", flush=True)


def shown(items: Iterable[Item], what: str, total: int | None = None, unit: str = "image") -> Iterator[Item]:
    """Pass items on, and show how many have passed."""
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.update()
