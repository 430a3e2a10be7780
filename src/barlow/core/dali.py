"""DALI's image decoder as training uses it, and a process that tells what it makes of an image.

DALI may end its process by a segmentation fault after an image that it does not decode. So whoever is not sure of an
image asks a `Decoder`.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import numpy as np

from barlow.core import images

BATCH = 64  # images per run of the pipeline, at most
BATCH_BYTES = 256 * 2**20  # of a batch's files and pixels together, at most; a larger image is a batch of its own
PRELOAD = ["nvidia.dali.fn"]  # for `set_forkserver_preload`, so that the import is shared as well
Item = TypeVar("Item")


class Decoded(NamedTuple):
    """What DALI decoded an image to."""

    height: int  # px
    width: int
    digest: int  # `images.digest` of the pixels


def decoded(encoded: Any, device: str = "cpu") -> Any:
    """Return the node that decodes images to RGB, in training and in `Decoder`; `device` is cpu or mixed (a GPU)."""
    from nvidia.dali import fn, types  # takes a second, and the process that asks a `Decoder` does without

    # Without fancy upsampling a GPU repeats the chroma of a JPEG, up to 18 levels from what the CPU always does.
    return fn.decoders.image(encoded, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True)


def batches(items: Iterable[Item], cost: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yield runs of at most BATCH items whose costs, in bytes, are at most BATCH_BYTES together."""
    batch: list[Item] = []
    total = 0
    for item in items:
        if batch and (len(batch) == BATCH or total + cost(item) > BATCH_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += cost(item)
    if batch:
        yield batch


class Decoder:
    """DALI on one thread in a process of its own, which is replaced whenever an image fails or kills it.

    A process that has seen a failure is never asked again, so the answer about an image depends on that image alone.

    Args:
        fork: fork the processes off this one, which must have no threads. It saves the second that an import of DALI
            takes, per `Decoder`.
    """

    def __init__(self, fork: bool = False) -> None:
        self._fork = fork
        self._asked: list[bytes] = []
        self._process: BaseProcess | None = None
        self._connection: connection.Connection

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def decode(self, encoded: Sequence[bytes]) -> list[Decoded | None]:
        """Return what DALI decodes each of at most BATCH image files to; None if it fails.

        Raises:
            RuntimeError: DALI does not even start.
        """
        self.send(encoded)
        return self.receive()

    def send(self, encoded: Sequence[bytes]) -> None:
        """Begin with what `decode` does, and return at once; `receive` must be next."""
        self._asked = list(encoded)
        if self._asked and self._process is None:
            self._start()
        if self._asked:
            with suppress(OSError):  # the process is gone, as `receive` will find out
                self._connection.send(self._asked)

    def receive(self) -> list[Decoded | None]:
        """Return what `decode` returns for the files that were sent."""
        asked = self._asked
        if not asked:
            return []
        try:
            answers: list[Decoded | None] = self._connection.recv()
        except (EOFError, OSError):
            self._stop()
            return [None] if len(asked) == 1 else [self.decode([one])[0] for one in asked]
        return answers

    def _start(self) -> None:
        if self._fork:
            import nvidia.dali.fn  # noqa: F401  # before the fork: a replacement is there in milliseconds
        context: Any = get_context("fork" if self._fork else "forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, self._connection), daemon=True)
        self._process.start()
        child.close()
        try:
            self._connection.recv()
        except EOFError:
            self._stop()
            raise RuntimeError("DALI does not start; try `python -c 'import nvidia.dali.fn'`") from None

    def _stop(self) -> None:
        if self._process:
            self._connection.close()
            self._process.kill()  # it holds nothing but memory
            self._process.join()
            self._process = None


def in_turn(
    decoders: Sequence[Decoder], batches: Iterable[tuple[Item, Sequence[bytes]]]
) -> Iterator[tuple[Item, list[Decoded | None]]]:
    """Yield, for each (name, image files), the name and what DALI decodes the files to; in order.

    Each decoder works on one batch while the caller reads the next or deals with an earlier one.
    """
    waiting: deque[tuple[Item, Decoder]] = deque()
    for (name, encoded), decoder in zip(batches, cycle(decoders), strict=False):
        ready = None
        if len(waiting) == len(decoders):
            ready = (waiting.popleft()[0], decoder.receive())
        decoder.send(encoded)
        waiting.append((name, decoder))
        if ready:
            yield ready
    for name, decoder in waiting:
        yield name, decoder.receive()


def _serve(asked: connection.Connection, asking: connection.Connection) -> None:
    """Decode batches of files until one fails or the process at the other end of the pipe, `asking`, is gone."""
    asking.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)  # codecs of DALI write there
    from nvidia.dali import Pipeline, fn

    batch: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    with Pipeline(BATCH, 1, None, prefetch_queue_depth=1, exec_dynamic=False) as pipeline:
        pipeline.set_outputs(decoded(fn.external_source(lambda: batch)))
    pipeline.build()
    asked.send("ready")
    try:
        while True:
            batch = [np.frombuffer(data, np.uint8) for data in asked.recv()]
            (pixels,) = pipeline.run()
            asked.send([_describe(np.asarray(pixels[i])) for i in range(len(batch))])
    except BaseException:
        os._exit(1)  # at once, since DALI may crash while it is taken down


def _describe(pixels: images.Pixels) -> Decoded:
    height, width, _ = pixels.shape
    return Decoded(height, width, images.digest(pixels))
