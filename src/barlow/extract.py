"""`barlow extract`: embed the images once, by the pretrained encoder and others, for all that is measured later.

Reads models/encoder.safetensors and data/shards. Writes data/features/NAME.safetensors, which `features.load` reads:
`pretrained`; the baselines `random` (an untrained network of the same shape) and `pixels`; `start`, the weights that
pretraining started from, if they were given; and one for each of `extract.weights`.

Features are the backbone's output for the whole image, resized, with no augmentation. train, val and test hold the
labelled images; if test has no labels, its first images stand in. `health` holds images of val, or of pretrain where
val is small; `view_a` and `view_b` hold two distorted views of as many images.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from barlow.core import bands, files, webdataset
from barlow.core.bands import PixelFormat
from barlow.core.errors import UserError
from barlow.core.progress import shown
from barlow.evaluation import features
from barlow.evaluation.features import CHUNK, Split
from barlow.settings.params import Params
from barlow.training import distributed, model
from barlow.training.views import TwinViews
from barlow.transfer import matching, places

SPLITS = ("train", "val", "test")
RESERVED = ("pretrained", "random", "pixels", "start")  # names of encoders
MIN_HEALTH_IMAGES = 100  # in val; with fewer, the health figures come from pretrain
HEALTH_IMAGES = 2000  # for the health figures, whose pairwise distances cost the square of this
PIXELS = 32  # px, the largest side of the images of the baseline `pixels`


def run(params: Params) -> None:
    """Write the features of the pretrained encoder, of both baselines with `extract.baselines`, and of given weights.

    Raises:
        UserError: there is no encoder, there are no shards, or given weights do not fit.
    """
    device = distributed.local_device()
    encoder = model.load_encoder()[0].to(device)
    networks = {"pretrained": encoder}
    if params.extract.baselines:
        torch.manual_seed(params.extract.seed)
        networks["random"] = model.FrozenEncoder(params.model, params.views).to(device)
        features.whiten(networks["random"], device)
        side = min(params.views.size, PIXELS)
        form = PixelFormat(params.model.channels, params.model.bits)
        features.save("pixels", {split: pixels(split, side, form) for split in SPLITS})
    for name, (weights, key) in given(params).items():
        networks[name] = model.FrozenEncoder(params.model, params.views)
        print(matching.load(weights, key, params, networks[name].backbone).text)
        features.whiten(networks[name].to(device), device)
    features.keep_only({*networks, *(("pixels",) if params.extract.baselines else ())})
    for name, network in networks.items():
        splits = {
            split: features.embed(network, shown(images_of(split), f"{name}, {split}"), device) for split in SPLITS
        }
        features.save(name, splits | health(network, params, device))
    print(f"{files.FEATURES}: " + ", ".join(f"{len(split.keys)} images of {name}" for name, split in splits.items()))


def given(params: Params) -> dict[str, tuple[str, str]]:
    """Return the weights to compare with, and the setting that gives them, by the name of their row in the tables.

    Raises:
        UserError: two of them, or one and another encoder, would have the same name.
    """
    rows = {"start": (params.model.weights, "model.weights")} if params.model.weights else {}
    for i, weights in enumerate(params.extract.weights):
        name = weights if places.is_public(weights) or weights.startswith(places.REGISTRY) else Path(weights).stem
        key = f"extract.weights[{i}]"
        if name in (*RESERVED, *rows) or "/" in name:
            raise UserError(f"{key}={weights} would be called {name!r} in the tables, like another; rename the file")
        rows[name] = weights, key
    return rows


def images_of(split: str) -> Iterator[webdataset.Sample]:
    """Yield the labelled images of a split; of a test split without labels its first images, for their neighbours."""
    samples = features.labelled(split)
    first = next(samples, None)
    if first is not None:
        return chain([first], samples)
    return islice(webdataset.read(webdataset.tars(split)), HEALTH_IMAGES if split == "test" else 0)


def health(encoder: model.FrozenEncoder, params: Params, device: torch.device) -> dict[str, Split]:
    """Return representations for the health figures: of up to 2,000 images, and of both views of as many.

    Before the whitening, which would hide how much the backbone tells apart.
    """
    tars = webdataset.tars("val")
    if webdataset.count(tars) < MIN_HEALTH_IMAGES:
        tars = webdataset.tars("pretrain")
    whole = features.represent(encoder, islice(webdataset.read(tars), HEALTH_IMAGES), device)
    batch = min(len(whole.keys), CHUNK)
    with torch.inference_mode():
        twins = islice(
            TwinViews(tars, params.views, batch, params.extract.seed, device_id=device.index),
            max(len(whole.keys) // batch, 1),
        )
        pairs = [[encoder.backbone(view.to(device)).cpu() for view in pair] for pair in twins]
    views = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    unlabelled = torch.zeros(0, dtype=torch.long)
    return {"health": whole} | {
        name: Split(view, unlabelled, []) for name, view in zip(("view_a", "view_b"), views, strict=True)
    }


def pixels(split: str, side: int, form: PixelFormat = bands.RGB) -> Split:
    """Return images, shrunk to `side` squared, as features: (n, channels * side * side), uint8, or float32 of 16 bits.

    Both are on the scale from 0 to 255.
    """

    def shrunk(data: bytes) -> Tensor:
        image = torch.tensor(bands.unpack(data))[None].permute(0, 3, 1, 2).float()
        resized = functional.interpolate(image, (side, side), mode="bilinear", antialias=True)
        if form.bits == 16:
            return (resized * (255 / form.white)).flatten(1)
        return resized.round().clamp(0, 255).to(torch.uint8).flatten(1)

    return features.through(
        shown(images_of(split), f"pixels, {split}"),
        shrunk,
        lambda parts: torch.cat(list(parts)),
        form.channels * side**2,
    )
