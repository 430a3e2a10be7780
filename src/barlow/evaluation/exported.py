"""An exported encoder's embeddings of the shards' images, and the accuracies measured on them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from barlow.core import bands, webdataset
from barlow.core.bands import Pixels
from barlow.core.errors import GateError
from barlow.encoder.encoder import Encoder
from barlow.evaluation import probe
from barlow.evaluation.features import Split, labelled, through
from barlow.evaluation.figures import Top1
from barlow.settings.params import Evaluate

ACCURACY_IMAGES = 10_000  # at most, of train and of test each, that `accuracy` embeds
COMPARED_IMAGES = 1000  # at most, whose neighbours two encoders are compared by


def embed(encoder: Encoder, samples: Iterator[webdataset.Sample]) -> Split:
    """Embed images with onnxruntime; raises as `outputs` does."""
    return outputs(encoder, samples)[0]


def outputs(encoder: Encoder, samples: Iterator[webdataset.Sample]) -> tuple[Split, Tensor]:
    """Return the embeddings and the logits (images, classes), which have no columns if no head was fitted.

    Raises:
        GateError: an embedding is not finite; the message names the image.
    """
    split, logits = _embed(encoder, samples)
    for key, finite in zip(split.keys, split.features.isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise GateError(f"the embedding of image {key} has a NaN or an infinity")
    return split, logits


def accuracy(encoder: Encoder, p: Evaluate) -> Top1 | None:
    """Measure as `barlow evaluate` does, kNN from train to test; None without labels or without a head."""
    (train, _), (test, logits) = (
        _embed(encoder, islice(labelled(split), ACCURACY_IMAGES)) for split in ("train", "test")
    )
    if not train.keys or not test.keys or encoder.classes is None:
        return None
    scores = probe.knn(test.features, *train[:2], len(encoder.classes), p.knn_k, p.knn_temperature)
    return Top1(probe.accuracy(logits.argmax(1), test.labels), probe.accuracy(scores.argmax(1), test.labels))


def compared(encoder: Encoder) -> Tensor:
    """Embed the images that encoders are compared on without labels: val's first, then pretrain's; (images, dim)."""
    tars = (tar for split in ("val", "pretrain") for tar in webdataset.tars(split))
    return _embed(encoder, islice(webdataset.read(tars), COMPARED_IMAGES))[0].features


def _embed(encoder: Encoder, samples: Iterator[webdataset.Sample]) -> tuple[Split, Tensor]:
    logits = [torch.zeros(0, len(encoder.classes or []))]

    def vectors(pixels: Iterator[Pixels]) -> Tensor:
        parts = list(encoder.run(pixels))
        logits.extend(torch.from_numpy(values) for _, values in parts if values is not None)
        return torch.cat([torch.from_numpy(embeddings) for embeddings, _ in parts])

    return through(samples, bands.unpack, vectors, encoder.dim), torch.cat(logits)
