"""What an exported encoder is worth: its embeddings of shards' images, and the accuracies read from them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from barlow.core import images, webdataset
from barlow.core.errors import GateError
from barlow.encoder.encoder import Encoder, Pixels
from barlow.evaluation import probe
from barlow.evaluation.features import Split, labelled, through
from barlow.settings.params import Evaluate

ACCURACY_IMAGES = 10_000  # of train and of test that `accuracy` embeds, at most


class Accuracy(NamedTuple):
    """Top-1 of the test images in percent."""

    linear_top1: float  # by the logits in the file
    knn_top1: float


def embed(encoder: Encoder, samples: Iterator[webdataset.Sample]) -> Split:
    """Embed images with onnxruntime.

    Raises:
        GateError: an embedding is not finite; the message names the image.
    """
    split, _ = _embed(encoder, samples)
    for key, finite in zip(split.keys, split.features.isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise GateError(f"the embedding of image {key} has a NaN or an infinity")
    return split


def accuracy(encoder: Encoder, p: Evaluate) -> Accuracy | None:
    """Measure as `barlow evaluate` does, kNN from train to test; None where one of them has no labels."""
    (train, _), (test, logits) = (
        _embed(encoder, islice(labelled(split), ACCURACY_IMAGES)) for split in ("train", "test")
    )
    if not train.keys or not test.keys or encoder.classes is None:
        return None
    votes = probe.knn(test.features, *train[:2], len(encoder.classes), p.knn_k, p.knn_temperature)
    return Accuracy(probe.accuracy(logits.argmax(1), test.labels), probe.accuracy(votes.argmax(1), test.labels))


def _embed(encoder: Encoder, samples: Iterator[webdataset.Sample]) -> tuple[Split, Tensor]:
    """Return the embeddings and the logits (images, classes), which have no column where no head was fitted."""
    logits = [torch.zeros(0, len(encoder.classes or []))]

    def vectors(pixels: Iterator[Pixels]) -> Tensor:
        parts = list(encoder.run(pixels))
        logits.extend(torch.from_numpy(found) for _, found in parts if found is not None)
        return torch.cat([torch.from_numpy(embeddings) for embeddings, _ in parts])

    return through(samples, images.decode, vectors, encoder.dim), torch.cat(logits)
