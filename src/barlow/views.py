"""The two distorted views of each image (paper, section 2.1 and appendix A), made by DALI on CPU or GPU.

The transform is the official one, with these differences: flipping comes last, fused into the normalisation (it
commutes with all before it); the colour jitter has one order, brightness and contrast, then saturation and hue; hue
turns in YIQ and not in HSV space.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from barlow import files, params, shards
from barlow.errors import UserError

SHUFFLE_BYTES = 256 * 2**20  # of image files that a reader holds to draw from; a smaller set is shuffled as a whole
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision weigh the channels


def random_resized_crop(pixels: Any, size: int, area: tuple[float, float], ratio: tuple[float, float]) -> Any:
    """Cut out a window of a random share of the area and width / height, and resize it, cubic and antialiased."""
    return fn.random_resized_crop(
        pixels, size=(size, size), random_area=area, random_aspect_ratio=ratio, interp_type=types.INTERP_CUBIC
    )


def color_jitter(pixels: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any) -> Any:
    """Scale brightness, contrast (about the image's mean gray) and saturation; turn the hue, in degrees."""
    channels = fn.reductions.mean(pixels, axes=(0, 1))
    center = fn.reductions.sum(channels * types.Constant(np.array(GRAY, dtype=np.float32)))
    pixels = math.clamp(brightness * (contrast * (pixels - center) + center), 0.0, 255.0)
    return fn.hsv(pixels, saturation=saturation, hue=hue, dtype=types.UINT8)


def grayscale(pixels: Any) -> Any:
    """Remove all colour, keep three channels."""
    gray = fn.color_space_conversion(pixels, image_type=types.RGB, output_type=types.GRAY)
    return fn.color_space_conversion(gray, image_type=types.GRAY, output_type=types.RGB)


def blur(pixels: Any, sigma: Any) -> Any:
    """Gaussian blur, with a window of three sigma on each side."""
    return fn.gaussian_blur(pixels, sigma=sigma)


def solarize(pixels: Any) -> Any:
    """Invert values of 128 and above."""
    return math.min(pixels, pixels ^ types.Constant(255, dtype=types.UINT8))


def normalize(pixels: Any, mirror: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Flip where `mirror` is 1, and turn 0 to 255 into float32 (3, height, width) of zero mean and unit deviation."""
    return fn.crop_mirror_normalize(
        pixels, mirror=mirror, mean=[255 * m for m in mean], std=[255 * s for s in std], output_layout="CHW"
    )


def uniform(low: float, high: float) -> Any:
    """Draw a number for each sample; DALI itself refuses an empty range."""
    return low + (high - low) * fn.random.uniform(range=(0.0, 1.0))


def augment(pixels: Any, views: params.Views, view: int) -> Any:
    """Distort decoded images; `view` is 0 for A, 1 for B."""
    out = random_resized_crop(pixels, views.size, views.crop_area, views.crop_ratio)
    if fn.random.coin_flip(probability=views.jitter, dtype=types.BOOL):
        strengths = (views.brightness, views.contrast, views.saturation)
        brightness, contrast, saturation = [uniform(1 - strength, 1 + strength) for strength in strengths]
        out = color_jitter(out, brightness, contrast, saturation, uniform(-360 * views.hue, 360 * views.hue))
    if fn.random.coin_flip(probability=views.grayscale, dtype=types.BOOL):
        out = grayscale(out)
    if fn.random.coin_flip(probability=views.blur[view], dtype=types.BOOL):
        out = blur(out, uniform(*views.blur_sigma))
    if fn.random.coin_flip(probability=views.solarize[view], dtype=types.BOOL):
        out = solarize(out)
    return normalize(out, fn.random.coin_flip(probability=views.flip), views.mean, views.std)


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def twin_pipeline(tars: list[Path], views: params.Views, fill: int, rank: int, world_size: int, order: int) -> Any:
    """Read, decode once, distort twice.

    Each image is drawn from `fill` that are held; with 0 all come in their order. The tars too are read in a new order
    in each epoch, seeded by `order` for all ranks alike, but only where there are more tars than ranks: with it on,
    DALI gives each rank the same places in every epoch, which for a single tar would be the same images.
    """
    shuffle: dict[str, Any] = {"random_shuffle": True, "initial_fill": fill} if fill else {}
    if fill and len(tars) > world_size:
        shuffle |= {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": order}
    encoded = fn.readers.webdataset(
        paths=[str(tar) for tar in tars],
        index_paths=[str(shards.index(tar)) for tar in tars],
        ext=";".join(shards.EXTENSIONS),
        shard_id=rank,
        num_shards=world_size,
        pad_last_batch=True,  # no batch runs over the end of an epoch
        **shuffle,
    )
    device = "cpu" if Pipeline.current().device_id is None else "mixed"
    pixels = fn.decoders.image(encoded, device=device, output_type=types.RGB)
    return augment(pixels, views, 0), augment(pixels, views, 1)


class TwinViews:
    """Endless epochs of view pairs from tar shards, in an order that is new in each epoch and fixed by the seed.

    `for view_a, view_b in twin_views` is one epoch (after a restore or a `break`: the rest of one) of `len()` batches:
    normalised float32 (batch_size, 3, size, size) tensors on the device. Each rank sees a different part of the images
    in each epoch; the last ones, which fill no batch on every rank, are left out.

    `tars` and `seed` are the same on every rank; `batch_size` is one rank's; `device_id` is the GPU that decodes and
    distorts, None the CPU; `threads` are DALI's, None one a processor.

    Raises:
        UserError: the images do not fill one batch on every rank, or (while iterating) one does not decode.
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
        count = shards.count(tars)
        self._batches = count // world_size // batch_size
        if not self._batches:
            raise UserError(
                f"pretrain.batch_size={batch_size * world_size} is more than the {count} images there are to pretrain "
                f"on; lower it or add images"
            )
        self._unread = ceil(ceil(count / world_size) / batch_size) - self._batches  # incomplete batches, 0 or 1
        self._batch = 0  # the next one's number in its epoch
        self._tars = tars
        self._fingerprint = {
            "shards": shards.digest(tars),
            "views": json.dumps(asdict(views), sort_keys=True),
            "batch_size": batch_size,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "device": "cpu" if device_id is None else "gpu",
            "dali": nvidia.dali.__version__,
        }
        mean_bytes = sum(tar.stat().st_size for tar in tars) / count
        self._arguments: dict[str, Any] = {
            "tars": tars,
            "views": views,
            "fill": min(ceil(SHUFFLE_BYTES / mean_bytes), count),
            "rank": rank,
            "world_size": world_size,
            "order": seed,
            "batch_size": batch_size,
            "seed": seed * world_size + rank,
            "device_id": device_id,
            "num_threads": threads or files.cpus(),
            "enable_checkpointing": True,
        }
        self._pipeline: Any = None

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self._batch, self._batches):
            pair = self._run()
            self._batch += 1
            if self._batch == self._batches:  # go on to the next epoch before the yield: a state saved now lies there
                for _ in range(self._unread):
                    self._run()
                self._batch = 0
            yield pair

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the batch that was yielded last: what follows is the same after a restore."""
        return {**self._fingerprint, "batch": self._batch, "pipeline": self._build().checkpoint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken.

        Raises:
            ValueError: the state belongs to other images, settings or processes; says which.
        """
        for name, value in self._fingerprint.items():
            if state.get(name) != value:
                raise ValueError(f"the saved state has another {name}: {state.get(name)!r}, not {value!r}")
        self._batch = state["batch"]
        self._pipeline = twin_pipeline(**self._arguments, checkpoint=state["pipeline"])

    def _build(self) -> Any:
        if self._pipeline is None:
            self._pipeline = twin_pipeline(**self._arguments)
        return self._pipeline

    def _run(self) -> tuple[Tensor, Tensor]:
        try:
            view_a, view_b = self._build().run()
        except RuntimeError as error:
            if bad := _undecodable(self._tars):
                raise UserError(f"{bad} cannot be decoded; replace the image and run ingest again") from None
            raise error
        return from_dlpack(view_a.as_tensor()), from_dlpack(view_b.as_tensor())


def _undecodable(tars: list[Path]) -> str:
    """Return the tar and the members of the first images in it that DALI does not decode; empty if there are none."""
    for tar in tars:
        samples = shards.read([tar])
        while chunk := list(islice(samples, 256)):
            if not _decodes(chunk):
                return f"{tar}: " + ", ".join(f"{s.key}.{s.extension}" for s in chunk if not _decodes([s]))
    return ""


def _decodes(samples: list[shards.Sample]) -> bool:
    with Pipeline(len(samples), files.cpus(), None, prefetch_queue_depth=1) as pipeline:
        encoded = [np.frombuffer(sample.data, np.uint8) for sample in samples]
        pipeline.set_outputs(fn.decoders.image(fn.external_source(lambda: encoded), output_type=types.RGB))
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True


def pairs(tars: list[Path], views: params.Views, n: int, seed: int) -> tuple[Pixels, Pixels]:
    """Return both views of the first `n` images as the network sees them, as uint8 (n, size, size, 3), for display."""
    options = {"num_threads": files.cpus(), "device_id": None, "prefetch_queue_depth": 1, "seed": seed}
    n = min(n, shards.count(tars))
    pipeline = twin_pipeline(tars, views, fill=0, rank=0, world_size=1, order=0, batch_size=n, **options)
    mean, std = np.array(views.mean), np.array(views.std)
    normalized = [np.asarray(view.as_tensor()).transpose(0, 2, 3, 1) for view in pipeline.run()]
    view_a, view_b = ((255 * (view * std + mean)).round().clip(0, 255).astype(np.uint8) for view in normalized)
    return view_a, view_b
