"""Frozen features: the images of shards, decoded and put through an encoder with no augmentation; kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import ceil
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from barlow.core import bands, files, webdataset
from barlow.core.weights import save_weights
from barlow.evaluation import probe
from barlow.training import distributed, model

WHITENING_IMAGES = 4096  # that mean and covariance are taken from
CHUNK = 256  # images decoded and embedded at a time
KNN = (20, 0.1)  # k and temperature of the kNN during training; pretraining must not depend on evaluate's

Pixels = TypeVar("Pixels")


class Split(NamedTuple):
    """Images of a split as the encoder sees them."""

    features: Tensor  # (n, dim), float32; uint8 where they are pixels of 8 bits
    labels: Tensor  # int64 (n,), -1: none
    keys: list[str]


def labelled(split: str) -> Iterator[webdataset.Sample]:
    """Yield the images of a split that have a label."""
    return (sample for sample in webdataset.read(webdataset.tars(split)) if sample.label >= 0)


def embed(encoder: model.FrozenEncoder, samples: Iterator[webdataset.Sample], device: torch.device) -> Split:
    """Embed images with torch: decoded and resized on the CPU, the rest on the device, where the encoder is."""
    whole = represent(encoder, samples, device)
    with torch.no_grad():
        return whole._replace(features=encoder.whitening(whole.features.to(device)).cpu())


def whiten(encoder: model.FrozenEncoder, device: torch.device) -> None:
    """Fit the encoder's whitening, if it has one, on the first images of the pretrain shards."""
    if isinstance(encoder.whitening, model.Whitening):
        samples = islice(webdataset.read(webdataset.tars("pretrain")), WHITENING_IMAGES)
        encoder.whitening.fit(represent(encoder, samples, device).features)


def represent(encoder: model.FrozenEncoder, samples: Iterator[webdataset.Sample], device: torch.device) -> Split:
    """Return what `embed` returns, before the whitening."""

    def resized(data: bytes) -> Tensor:
        # On the CPU: the CUDA kernel fails where a side shrinks by more than 94 (pytorch/vision issue 7671).
        return encoder.resize(torch.tensor(bands.unpack(data))[None])

    def vectors(pixels: Iterator[Tensor]) -> Tensor:
        with torch.inference_mode():
            features: Tensor = encoder.backbone(encoder.normalise(torch.cat(list(pixels)).to(device)))
        return features.float().cpu()

    return through(samples, resized, vectors, encoder.backbone.dim)


def through(
    samples: Iterator[webdataset.Sample],
    decode: Callable[[bytes], Pixels],
    vectors: Callable[[Iterator[Pixels]], Tensor],
    dim: int,
) -> Split:
    """Decode images in threads, some at a time, and put them through `vectors`: (images, dim)."""
    features, labels, keys = list[Tensor](), list[int](), list[str]()
    with ThreadPoolExecutor(files.cpus()) as pool:
        while chunk := list(islice(samples, CHUNK)):
            features.append(vectors(pool.map(decode, (sample.data for sample in chunk))))
            labels += [sample.label for sample in chunk]
            keys += [sample.key for sample in chunk]
    whole = torch.cat(features) if features else torch.zeros(0, dim)
    return Split(whole, torch.tensor(labels, dtype=torch.long), keys)


def save(encoder: str, splits: Mapping[str, Split]) -> None:
    """Keep what an encoder made of some splits."""
    tensors = dict[str, Tensor]()
    for name, split in splits.items():
        keys = np.array(split.keys, "S")
        letters = keys.view(np.uint8).reshape(len(keys), keys.itemsize)
        parts = zip(Split._fields, (split.features, split.labels, torch.from_numpy(letters)), strict=True)
        tensors |= {f"{name}.{field}": tensor for field, tensor in parts}
    save_weights(files.FEATURES / f"{encoder}.safetensors", tensors, {})


def keep_only(encoders: Iterable[str]) -> None:
    """Delete what an earlier run kept of other encoders."""
    for name in {*kept()} - {*encoders}:
        (files.FEATURES / f"{name}.safetensors").unlink()


def kept() -> list[str]:
    """Return the names of the encoders that there are features of: the pretrained one first, then the baselines."""
    names = {path.name.removesuffix(".safetensors") for path in files.FEATURES.glob("[!.]*.safetensors")}
    known = [name for name in ("pretrained", "random", "pixels", "start") if name in names]
    return known + sorted(names - {*known})


def load(encoder: str, name: str) -> Split:
    """Read a split of what `barlow extract` kept.

    Raises:
        UserError: there is none.
    """
    path = files.FEATURES / f"{encoder}.safetensors"
    files.require(path, "extract")
    with safe_open(path, framework="pt") as file:
        features, labels, letters = (file.get_tensor(f"{name}.{field}") for field in Split._fields)
    keys = letters.numpy().view(f"S{letters.shape[1]}").flatten() if letters.numel() else []
    return Split(features, labels, [key.decode() for key in keys])


def knn_on_val(encoder: model.FrozenEncoder, device: torch.device) -> dict[str, float]:
    """Return {"knn_val_top1": percent}, the kNN accuracy on val with neighbours of train; {} if either has no labels.

    All processes take part, each with its share of the images. Each returns what one process alone would.
    """
    rank, world = distributed.rank(), distributed.world_size()
    # Every process reads all tars, since labels lie between the images, but decodes and embeds its own share alone.
    train, val = (embed(encoder, islice(labelled(split), rank, None, world), device) for split in ("train", "val"))
    n_train, n_val = (int(distributed.all_reduce(torch.tensor(len(split.keys)))) for split in (train, val))
    if not n_train or not n_val:
        return {}
    bank, labels = gathered(train.features, n_train), gathered(train.labels, n_train)
    scores = probe.knn(val.features, bank, labels, len(webdataset.classes()), *KNN)
    predicted, labels = gathered(scores.argmax(1), n_val), gathered(val.labels, n_val)
    return {"knn_val_top1": probe.accuracy(predicted, labels)}


def gathered(part: Tensor, n: int) -> Tensor:
    """Gather all `n` rows in their order, of which process i holds rows i, i + world_size, ..."""
    world = distributed.world_size()
    if world == 1:
        return part
    padded = part.new_zeros(ceil(n / world), *part.shape[1:])  # all_gather takes equally many rows of each process
    padded[: len(part)] = part
    return distributed.all_gather(padded).reshape(world, *padded.shape).transpose(0, 1).flatten(0, 1)[:n]
