"""Dynamic batching: images of several requests go through the encoder together.

A worker thread takes waiting images, decodes them, runs the network and hands the answers to the event loop. By default
there is one thread per processor and each batch uses one processor, so one batch is decoded while another is computed.
All images of a request go to the same encoder, even if a new encoder replaces it meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from barlow.core import files
from barlow.core.bands import PixelFormat, Pixels, decode
from barlow.core.images import TooManyPixelsError, UnknownFormatError
from barlow.encoder.encoder import Encoder, Vectors
from barlow.serving.limits import RequestError
from barlow.serving.metrics import Metrics
from barlow.settings.flags import Flags

MAX_SIDE = 2**16  # pixels, the most that JPEG allows; the resize in the network fails on sides of millions
logger = logging.getLogger("uvicorn.error")


class Answer(NamedTuple):
    """The network's outputs for one image."""

    embedding: Vectors  # (dim,)
    logits: Vectors | None  # (classes,)


class Failure(NamedTuple):
    """Why one image has no answer: the arguments of a `RequestError`.

    It is a value and not an exception, because the traceback of an exception would keep the image in memory.
    """

    status: int
    reason: str
    message: str


@dataclass
class Job:
    """The images of one request; times are in seconds."""

    images: Sequence[bytes | Pixels]
    deadline: float
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    arrived: float = field(default_factory=time.monotonic)
    answers: list[Answer | Failure | None] = field(default_factory=list)
    left: int = 0
    queue: float = 0.0  # until a thread took the last image
    decode: float = 0.0  # sum over the images
    infer: float = 0.0  # of the slowest batch


class Engine:
    """An encoder with its queue and threads. Only the event loop's thread may call `submit` and `close`."""

    def __init__(self, encoder: Encoder, flags: Flags, metrics: Metrics) -> None:
        self.encoder = encoder
        self._flags, self._metrics = flags, metrics
        self._queue: deque[tuple[Job, int]] = deque()
        self._changed = threading.Condition()
        self._idle, self._closed = 0, False
        self._jobs = 0  # submitted and not answered
        self._drained = asyncio.Event()
        self._drained.set()
        workers = max(files.cpus() // flags.threads, 1)
        self._threads = [threading.Thread(target=self._work, daemon=True, name="barlow") for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    async def submit(self, images: Sequence[bytes | Pixels]) -> Job:
        """Decode and embed images; the job's `answers` are in the order of the images.

        Raises:
            RequestError: the queue is full, or the time is over (503).
        """
        loop, seconds = asyncio.get_running_loop(), self._flags.timeout_ms / 1000
        job = Job(images, time.monotonic() + seconds, loop, loop.create_future(), left=len(images))
        job.answers = [None] * len(images)
        with self._changed:
            if len(self._queue) + len(images) > self._flags.max_queue:
                raise RequestError(503, "queue", f"{len(self._queue)} images are waiting already; try again")
            self._queue.extend((job, i) for i in range(len(images)))
            self._changed.notify(len(images))
        self._metrics.queue.set(len(self._queue))
        self._jobs += 1
        self._drained.clear()
        timer = loop.call_later(seconds, _end, job)
        try:
            await job.done
            if job.left:
                raise RequestError(503, "deadline", f"no answer within {self._flags.timeout_ms} ms; try again")
        finally:
            timer.cancel()
            job.deadline = 0.0  # if the client is gone, the workers skip its remaining images
            self._jobs -= 1
            if not self._jobs:
                self._drained.set()
        return job

    async def close(self) -> None:
        """Wait for the submitted jobs, then end the threads; nothing uses the encoder after that."""
        await self._drained.wait()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _take(self) -> list[tuple[Job, int]]:
        """Wait for images and return a share of them, so that the other idle threads get some too."""
        most, delay = self._flags.max_batch_size, self._flags.max_queue_delay_us / 1e6
        with self._changed:
            self._idle += 1
            while not self._queue and not self._closed:
                self._changed.wait()
            while self._queue and not self._closed and len(self._queue) < most:
                left = self._queue[0][0].arrived + delay - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            share = -(-len(self._queue) // self._idle)
            self._idle -= 1
            batch = [self._queue.popleft() for _ in range(min(share, most, len(self._queue)))]
            if self._queue:
                self._changed.notify()
            return batch

    def _work(self) -> None:
        while not self._closed:
            self._serve()

    def _serve(self) -> None:
        """Take and answer one batch; as its own function, it frees their images before the thread waits again."""
        if batch := self._take():
            self._metrics.queue.set(len(self._queue))
            answers = self._run(batch)
            loop = batch[0][0].loop
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, answers)

    def _run(self, batch: list[tuple[Job, int]]) -> list[tuple[Job, int, Answer | Failure]]:
        started, decoding = time.monotonic(), 0.0
        answers: list[tuple[Job, int, Answer | Failure]] = []
        good: deque[tuple[Job, int]] = deque()

        def pixels() -> Iterator[Pixels]:
            nonlocal decoding
            for job, i in batch:
                self._metrics.waited.observe(started - job.arrived)
                begun = time.monotonic()
                if begun > job.deadline:
                    answers.append((job, i, Failure(503, "deadline", "the time was over before its turn")))
                    continue
                image = _decoded(job.images[i], self._flags.max_pixels, self.encoder.form)
                if isinstance(image, Failure):
                    answers.append((job, i, image))
                    continue
                seconds = time.monotonic() - begun
                job.queue, job.decode, decoding = started - job.arrived, job.decode + seconds, decoding + seconds
                good.append((job, i))
                yield image

        try:
            for embeddings, logits in self.encoder.run(pixels(), len(batch)):
                self._metrics.batch.observe(len(embeddings))
                for row, embedding in enumerate(embeddings):
                    answers.append((*good.popleft(), Answer(embedding, None if logits is None else logits[row])))
        except Exception:
            answered = {(id(job), i) for job, i, _ in answers}
            left = [(job, i) for job, i in batch if (id(job), i) not in answered]
            if len(batch) > 1:  # run each image alone, so that one bad image does not fail the others
                answers += [answer for entry in left for answer in self._run([entry])]
            else:
                logger.exception("the model failed")
                answers += [(job, i, Failure(500, "model", "the model failed on this image")) for job, i in left]
        infer = time.monotonic() - started - decoding
        for job, _ in batch:
            job.infer = max(job.infer, infer)
        return answers


def _decoded(image: bytes | Pixels, max_pixels: int, form: PixelFormat) -> Pixels | Failure:
    """Decode an image, or return why it cannot be decoded."""
    try:
        pixels = decode(image, form, max_pixels) if isinstance(image, bytes) else image
    except TooManyPixelsError as error:
        return Failure(413, "pixels", str(error))
    except UnknownFormatError as error:
        return Failure(415, "format", str(error))
    except ValueError as error:
        return Failure(422, "damaged", str(error))
    height, width = pixels.shape[:2]
    if max(height, width) > MAX_SIDE:
        return Failure(413, "pixels", f"{width} x {height} pixels, a side longer than the {MAX_SIDE} allowed")
    return pixels


def _deliver(answers: list[tuple[Job, int, Answer | Failure]]) -> None:
    for job, i, answer in answers:
        job.answers[i] = answer
        job.left -= 1
        if not job.left:
            _end(job)


def _end(job: Job) -> None:
    """Wake the job's `submit`: all images are answered, or the time is over."""
    if not job.done.done():
        job.done.set_result(None)
