"""What pretraining measures, a row an epoch: DVCLive's files for `dvc plots` and the report, and a line to read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from dvclive import Live

from barlow import distributed, files

FOLDER = files.REPORTS / "pretrain"
Item = TypeVar("Item")


class Curves:
    """The curves of a run, in reports/pretrain/; after a resume they are written anew from the rows so far."""

    def __init__(self, history: list[dict[str, float]]) -> None:
        self._live = Live(str(FOLDER), save_dvc_exp=False, dvcyaml=None) if distributed.rank() == 0 else None
        for row in history:
            self.write(row)

    def write(self, row: dict[str, float]) -> None:
        """Append an epoch."""
        if self._live is not None:
            for name, value in row.items():
                self._live.log_metric(name, value)
            self._live.next_step()


class Meter:
    """Wall time since the last row, and the share of it spent waiting for data."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self._started, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def waits(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Pass the batches on and count the time that each takes to come."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            self._steps += 1
            yield batch

    def row(self) -> dict[str, float]:
        """Return seconds, samples per second and the data wait (0 to 1) since the last row, and start the next."""
        seconds = time.perf_counter() - self._started
        row = {"seconds": seconds, "samples_per_second": self._steps * self._batch_size / seconds}
        row["data_wait"] = self._waited / seconds
        self._reset()
        return row


def describe(row: dict[str, float]) -> str:
    """Put a row into a line."""
    return (
        f"loss {row['loss']:.1f}  on-diagonal {row['on_diagonal']:.4f}  off-diagonal {row['off_diagonal']:.6f}  "
        f"lr {row['lr']:.4f}  {row['samples_per_second']:.0f} images/s  data wait {row['data_wait']:.1%}"
    )
