"""What pretraining shows: progress while it runs, and curves, one row per epoch, for `dvc plots` and the report."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from barlow.core import files
from barlow.training import distributed

FOLDER = files.REPORTS / "pretrain"
SECONDS = 10  # between two lines where there is no terminal
Item = TypeVar("Item")


class Curves:
    """The curves of a run, in reports/pretrain/; after a resume, written anew from the rows in the checkpoint."""

    def __init__(self, history: list[dict[str, float]]) -> None:
        self._live = None
        if distributed.rank() == 0:
            from dvclive import Live  # here, since pandas comes with it

            self._live = Live(str(FOLDER), save_dvc_exp=False, dvcyaml=None)
        for row in history:
            self.write(row)

    def write(self, row: dict[str, float]) -> None:
        """Append the row of an epoch."""
        if self._live is not None:
            for name, value in row.items():
                self._live.log_metric(name, value)
            self._live.next_step()


class Progress:
    """A bar in a terminal, else one line every ten seconds; one line per epoch; and the clock behind them.

    `step` is where the run starts. `shown` is True on one process; the others only measure time.
    """

    def __init__(self, step: int, epoch_steps: int, epochs: int, batch_size: int, shown: bool) -> None:
        self._epoch_steps, self._epochs, self._batch_size, self._shown = epoch_steps, epochs, batch_size, shown
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm  # here, so that a bare machine can train without it

            self._bar = tqdm(initial=step, total=epoch_steps * epochs, unit="step")
        self._steps, self._waited = step, 0.0
        self._epoch = self._line = self._now()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def waits(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Pass batches on; count the steps, and the time spent waiting for batches."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            self._steps += 1
            yield batch
            if self._bar is not None:
                self._bar.update()

    def due(self) -> bool:
        """Say whether it is time for `show`. Its figures lie on the device, and reading them waits for the device."""
        interval = SECONDS if self._bar is None else SECONDS / 10
        return self._shown and time.perf_counter() - self._line[0] > interval

    def show(self, figures: Mapping[str, float]) -> None:
        """Show the figures of the latest step; `describe` puts them into words."""
        since = self._since(self._line)
        left = (self._epoch_steps * self._epochs - self._steps) * self._batch_size / since["samples_per_second"]
        self._line = self._now()
        text = f"{describe({**figures, **since})}  {timedelta(seconds=round(left))} left"
        if self._bar is None:
            epoch = (self._steps - 1) // self._epoch_steps + 1
            place = f"epoch {epoch}/{self._epochs}  step {self._steps}/{self._epoch_steps * self._epochs}"
            print(f"{place}  {text}", flush=True)
        else:
            self._bar.set_postfix_str(text)

    def epoch_figures(self) -> dict[str, float]:
        """Return seconds, samples per second and the share of time spent on waiting for data since `end_epoch`."""
        return self._since(self._epoch)

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Print the finished epoch and restart the clock; time since `epoch_figures` belongs to no epoch."""
        if self._shown:
            place = f"epoch {self._steps // self._epoch_steps}/{self._epochs}"
            write = print if self._bar is None else self._bar.write
            write(f"{place}  {describe(row)}")
            sys.stdout.flush()
        self._epoch = self._line = self._now()

    def _now(self) -> tuple[float, float, int]:
        return time.perf_counter(), self._waited, self._steps

    def _since(self, mark: tuple[float, float, int]) -> dict[str, float]:
        seconds, waited, steps = (now - then for now, then in zip(self._now(), mark, strict=True))
        return {
            "seconds": seconds,
            "samples_per_second": steps * self._batch_size / seconds,
            "data_wait": waited / seconds,
        }


def describe(row: Mapping[str, float]) -> str:
    """Return figures as one line."""
    knn = f"  kNN on val {row['knn_val_top1']:.1f} %" if "knn_val_top1" in row else ""
    return (
        f"loss {row['loss']:.1f}  invariance {row['invariance']:.4f}  redundancy {row['redundancy']:.6f}  "
        f"lr {row['lr']:.4f}  {row['samples_per_second']:.0f} images/s  data wait {row['data_wait']:.1%}{knn}"
    )
