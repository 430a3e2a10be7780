"""Batches of view pairs from tar shards (paper, section 2.1), decoded and distorted by DALI on CPU or GPU.

The images of a batch and their distortions are drawn here, from the seed and the number of the batch alone. DALI gets
them. So the global batch of a step is the same at any number of processes, and to resume takes nothing but the step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, count, islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from barlow.core import bands, dali, files, webdataset
from barlow.core.errors import UserError
from barlow.settings import params
from barlow.training.distort import augment, draw, passed, received, used

SHUFFLE_BYTES = 256 * 2**20  # of image files that are mixed with each other; a smaller set is shuffled as a whole
BLOCKS = 64  # runs of neighbouring files in SHUFFLE_BYTES
AHEAD = 16  # batches between asking the disk for files and using them
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


# With `exec_dynamic` each output has memory of its own, so `from_dlpack` need not copy. DALI reuses the memory of a
# freed tensor on a GPU only after all work that was queued there by then, on whatever stream.
@pipeline_def(enable_conditionals=True, exec_dynamic=True)  # type: ignore[untyped-decorator]
def view_pipeline(batches: Any, views: params.Views, count: int, form: bands.PixelFormat = bands.RGB) -> Any:
    """Decode once, distort `count` times; `batches` yields (`Samples.stored`, *draws of one view, *of the next)."""
    n = len(used(form))
    layout = None if form == bands.RGB else ["HWC", *[""] * (count * n)]
    encoded, *drawn = fn.external_source(batches, num_outputs=1 + count * n, layout=layout)
    device = "cpu" if Pipeline.current().device_id is None else "mixed"
    as_is = encoded if device == "cpu" else encoded.gpu()  # arrays
    pixels = dali.decoded(encoded, device) if form == bands.RGB else as_is
    return tuple(augment(pixels, received(drawn[i * n : (i + 1) * n], form), views, form) for i in range(count))


def epoch_order(n: int, fill: int, rng: np.random.Generator) -> Indices:
    """Return 0 to n - 1 in a new order: shuffle runs of `fill` / BLOCKS numbers, then mix each `fill` numbers.

    So a set that is larger than memory is read in long stretches. With `fill` >= n, every order is equally likely.
    """
    block = ceil(fill / BLOCKS)
    starts = rng.permutation(ceil(n / block)) * block
    order = (starts[:, None] + np.arange(block)).ravel()
    order = order[order < n]
    for part in np.split(order, range(fill, n, fill)):
        rng.shuffle(part)
    return order


def part(batch_size: int, rank: int, world_size: int) -> slice:
    """Return a rank's slice of the global batch; raises UserError where the ranks cannot share the batch evenly."""
    if batch_size % world_size:
        raise UserError(f"pretrain.batch_size={batch_size} is not divisible by {world_size} processes; use a multiple")
    local = batch_size // world_size
    return slice(rank * local, (rank + 1) * local)


class TwinViews:
    """Endless epochs of view pairs from tar shards; each epoch has a new order, which the seed fixes.

    `for view_a, view_b in twin_views` is one epoch of `len()` batches (after a restore or a `break`, the rest of one):
    normalised float32 tensors (batch_size / world_size, channels, size, size) on the device. Each rank yields its part
    of the global batch, which does not depend on `world_size`. An epoch's last images, too few, are left out.

    Args:
        tars: the shards; the same on every rank, like the next three.
        views: the distortions and their probabilities.
        batch_size: of all ranks together.
        seed: of the orders and the distortions.
        rank, world_size: this process, and how many there are.
        device_id: the GPU that decodes and distorts; None: the CPU.
        threads: of DALI; None: one per processor.

    Attributes:
        digest: hash of the tars.
        form: channels and bits of the images.

    Raises:
        UserError: the ranks cannot share a batch evenly, there are fewer images than a batch, or (while iterating) an
            image does not decode.
    """

    def __init__(
        self,
        tars: list[Path],
        views: params.Views,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device_id: int | None = None,
        threads: int | None = None,
    ) -> None:
        self._samples = webdataset.Samples(tars)
        self._part = part(batch_size, rank, world_size)
        if len(self._samples) < batch_size:
            raise UserError(
                f"pretrain.batch_size={batch_size} is more than the {len(self._samples)} images there are to pretrain "
                f"on; lower it or add images"
            )
        self.images = len(self._samples)
        self.form = self._samples.form
        self._batches = self.images // batch_size
        self._fill = ceil(len(self._samples) * SHUFFLE_BYTES / self._samples.bytes)  # images to mix at a time
        self._step = 0  # batches yielded so far, over all epochs
        self._tars, self._views, self._seed, self._batch_size = tars, views, seed, batch_size
        self.digest = webdataset.digest(tars)
        self._fingerprint = {
            "shards": self.digest,
            "views": json.dumps(asdict(views), sort_keys=True),
            "batch_size": batch_size,
            "seed": seed,
        }
        local = batch_size // world_size
        self._options = {"batch_size": local, "device_id": device_id, "num_threads": threads or files.cpus()}
        self._pipeline: Any = None

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self._step % self._batches, self._batches):
            pair = self._run()
            self._step += 1
            yield pair

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the batch that was yielded last; after a restore, the same batches follow."""
        return {**self._fingerprint, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken, on any rank and at any number of ranks.

        Raises:
            ValueError: the state belongs to other images or settings; names the first that differs.
        """
        for name, value in self._fingerprint.items():
            if state.get(name) != value:
                raise ValueError(f"the saved state has another {name}: {state.get(name)!r}, not {value!r}")
        self._step = state["step"]
        self._pipeline = None

    def build(self) -> None:
        """Build the pipeline now; else the first batch waits for it."""
        if self._pipeline is None:
            self._pipeline = view_pipeline(self._source(self._step), self._views, 2, self.form, **self._options)
            self._pipeline.build()

    def _run(self) -> tuple[Tensor, Tensor]:
        try:
            self.build()
            view_a, view_b = self._pipeline.run()
        except RuntimeError as error:
            if self.form == bands.RGB and (bad := _undecodable(self._tars)):
                raise UserError(f"{bad} cannot be decoded; replace the image and run ingest again") from None
            raise error
        return from_dlpack(view_a.as_tensor()), from_dlpack(view_b.as_tensor())

    def keys(self, step: int) -> list[str]:
        """Return the keys of the images in the global batch of a step, counted from 0 over all epochs."""
        return self._samples.keys(self._epoch(step // self._batches)[step % self._batches])

    def _epoch(self, epoch: int) -> Indices:
        """Return the numbers of the images in each global batch, (batches, batch_size)."""
        order = epoch_order(len(self._samples), self._fill, np.random.default_rng([self._seed, epoch]))
        return order[: self._batches * self._batch_size].reshape(self._batches, self._batch_size)

    def _source(self, step: int) -> Iterator[tuple[Any, ...]]:
        """Yield this rank's part of each global batch from `step` on, for `view_pipeline`."""
        for epoch in count(step // self._batches):
            whole = self._epoch(epoch)
            for batch in range(step % self._batches, self._batches):
                if self._fill < len(self._samples) and batch + AHEAD < self._batches:
                    self._samples.prefetch(whole[batch + AHEAD, self._part])
                # Counted from 1: numpy ignores a trailing 0, and [seed, epoch] is the seed of the order.
                rng, sides = np.random.default_rng([self._seed, epoch, batch + 1]), self._samples.sides[whole[batch]]
                drawn = (array for view in (0, 1) for array in passed(draw(self._views, view, sides, rng), self.form))
                yield self._samples.stored(whole[batch, self._part]), *(array[self._part] for array in drawn)
            step = 0


def single_views(
    samples: webdataset.Samples,
    numbers: Indices,
    views: params.Views,
    batch_size: int,
    steps: int,
    seed: int,
    device_id: int | None = None,
) -> Iterator[tuple[Tensor, Indices]]:
    """Yield `steps` batches: one view of each image, distorted like view B, with the numbers of the images.

    The images are `numbers` of `samples`, repeated as often as needed, each time in a new order. The views are
    normalised float32 tensors (batch_size, channels, size, size) on the device.
    """
    rng = np.random.default_rng(seed)
    endless = chain.from_iterable(rng.permutation(numbers) for _ in count())
    batches = [np.fromiter(islice(endless, batch_size), np.int64, batch_size) for _ in range(steps)]

    def source() -> Iterator[tuple[Any, ...]]:
        for batch in batches:
            yield samples.stored(batch), *passed(draw(views, 1, samples.sides[batch], rng), samples.form)

    options = {"batch_size": batch_size, "device_id": device_id, "num_threads": files.cpus()}
    pipeline = view_pipeline(source(), views, 1, samples.form, **options)
    for batch in batches:
        yield from_dlpack(pipeline.run()[0].as_tensor()), batch


def _undecodable(tars: list[Path]) -> str:
    """Name the first images that DALI does not decode, by their source files; return "" if it decodes all.

    The search happens in another process, since DALI in this one may crash after a failure.
    """
    names = webdataset.sources()
    with dali.Decoder() as decoder:
        for tar in tars:
            for batch in dali.batches(webdataset.read([tar]), lambda s: len(s.data) + 3 * s.height * s.width):
                decoded = decoder.decode([sample.data for sample in batch])
                bad = [sample for sample, pixels in zip(batch, decoded, strict=True) if pixels is None]
                if bad:
                    return f"{tar}: " + ", ".join(names.get(s.key, f"{s.key}.{s.extension}") for s in bad)
    return ""


def pairs(tars: list[Path], views: params.Views, n: int, seed: int) -> tuple[Pixels, Pixels]:
    """Return both views of the first `n` images, as the network sees them, for display: uint8 (n, size, size, 3)."""
    samples, rng = webdataset.Samples(tars), np.random.default_rng(seed)
    n = min(n, len(samples))
    sides = samples.sides[:n]
    drawn = (passed(draw(views, view, sides, rng), samples.form) for view in (0, 1))
    batch = (samples.stored(np.arange(n)), *chain(*drawn))
    options = {"num_threads": files.cpus(), "device_id": None, "prefetch_queue_depth": 1}
    pipeline = view_pipeline(lambda: batch, views, 2, samples.form, batch_size=n, **options)
    mean, std = np.array(views.mean), np.array(views.std)
    normalized = [np.asarray(view.as_tensor()).transpose(0, 2, 3, 1) for view in pipeline.run()]
    view_a, view_b = ((255 * (view * std + mean)).round().clip(0, 255).astype(np.uint8) for view in normalized)
    return bands.preview(view_a), bands.preview(view_b)
