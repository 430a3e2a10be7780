"""The gate: may this encoder replace the one in production?

Both encoders embed the same images in one run. For each, a linear probe and kNN learn from the same train images with
the same settings and predict the same test images. The comparison is therefore paired: only images that one encoder
alone gets right count, and the interval of the difference is far narrower than those of the two accuracies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from barlow.core import bands, files, webdataset
from barlow.core.errors import GateError
from barlow.encoder.encoder import Encoder, Vectors
from barlow.evaluation import features, intervals, probe
from barlow.evaluation.exported import embed, outputs
from barlow.evaluation.features import Split, labelled
from barlow.evaluation.figures import Accuracy, Candidate, Parity
from barlow.settings.params import Params
from barlow.training import health

HEALTH_IMAGES = 2000  # at most, whose embeddings serve effective rank and standard deviation
TIMED_RUNS = 51
KEY = "export.min_cosine"


class Check(NamedTuple):
    """One condition."""

    name: str
    passed: bool
    text: str  # the measured value and its bound


@dataclass(frozen=True)
class Measured:
    """An encoder's embeddings and, with labels, which test images it gets right."""

    val: Tensor  # float32 (images, dim), of val and then of pretrain
    test: Split
    right: dict[str, Tensor]  # by "linear", "knn", "logits": bool (labelled test images,); empty without labels

    def candidate(self) -> Candidate:
        """Return the figures that a person compares."""
        return Candidate(
            logits=_accuracy(self.right.get("logits")),
            linear=_accuracy(self.right.get("linear")),
            knn=_accuracy(self.right.get("knn")),
            effective_rank=health.effective_rank(self.val),
            std=health.spread(self.val),
        )


def _accuracy(right: Tensor | None) -> Accuracy | None:
    return None if right is None else intervals.accuracy(right)


def measure(encoder: Encoder, params: Params) -> Measured:
    """Embed the splits; if train, val and test all have labels, learn from train and predict test.

    Of a classifier, whose head was trained with its network, the logits count as well.

    Raises:
        GateError: an embedding is not finite (the message names the image), or there are no labels for a classifier.
    """
    p, classes = params.evaluate, len(webdataset.classes())
    train, val = (embed(encoder, labelled(name)) for name in ("train", "val"))
    test, logits = outputs(encoder, labelled("test"))
    if not test.keys:
        test = embed(encoder, islice(webdataset.read(webdataset.tars("test")), HEALTH_IMAGES))
    right = {}
    if train.keys and val.keys and test.keys and int(test.labels[0]) >= 0:
        predicted = probe.predict(train[:2], val[:2], test.features, classes, p.probe_l2, p.knn_k, p.knn_temperature)
        right = {"linear": predicted.linear == test.labels, "knn": predicted.knn == test.labels}
        if encoder.kind == "classifier":
            right["logits"] = _named_right(encoder, logits, test.labels)
    elif encoder.kind == "classifier":
        raise GateError("a classifier is judged on labels, which train, val and test must all have")
    tars = [tar for split in ("val", "pretrain") for tar in webdataset.tars(split)]  # val alone may be too small
    return Measured(embed(encoder, islice(webdataset.read(tars), HEALTH_IMAGES)).features, test, right)


def _named_right(encoder: Encoder, logits: Tensor, labels: Tensor) -> Tensor:
    """Say of which images the encoder names the class; its list of classes may differ from that of the labels."""
    named, wanted = encoder.classes or [], webdataset.classes()
    pairs = zip(logits.argmax(1).tolist(), labels.tolist(), strict=True)
    return torch.tensor([named[predicted] == wanted[label] for predicted, label in pairs])


def alone(candidate: Candidate, size: int, params: Params) -> Iterator[Check]:
    """Yield the checks that do not depend on the encoder in production; `size` is in bytes."""
    p = params.promote
    yield _at_least(
        "health: effective rank", candidate.effective_rank, p.min_effective_rank, "promote.min_effective_rank"
    )
    yield _at_least("health: standard deviation", candidate.std, p.min_std, "promote.min_std")
    yield Check("size", size <= p.max_bytes, f"{size:,} bytes, at most promote.max_bytes={p.max_bytes:,}")


def parity(test: Split, min_cosine: float) -> Check:
    """Compare onnxruntime's embeddings of the test images with torch's, which are in data/features."""
    in_torch = features.load("pretrained", "test")
    if in_torch.keys != test.keys or in_torch.features.shape != test.features.shape:
        return Check("parity", False, f"{files.FEATURES} are of other images or another encoder; run `dvc repro`")
    if not test.keys:
        return Check("parity", True, "no test images; `barlow export` compared other images")
    cosine = float(torch.nn.functional.cosine_similarity(test.features.double(), in_torch.features.double()).min())
    return _at_least("parity: smallest cosine to torch", cosine, min_cosine, KEY)


def recorded(parity: Parity, min_cosine: float) -> Check:
    """Judge what `barlow finetune --all-labels` measured of its file: torch's features of a classifier are not kept."""
    return _at_least(f"parity: smallest cosine to torch, {parity.images} images", parity.cosine_min, min_cosine, KEY)


def against(challenger: Measured, champion: Measured, params: Params) -> Iterator[Check]:
    """Check that the challenger is not worse: the paired interval of the difference lies above -promote.margin."""
    margin = params.promote.margin
    for name, right in challenger.right.items():
        gain = intervals.gain(right, champion.right[name])
        text = f"{gain}, the lower end at least -promote.margin={-margin:g}"
        yield Check(f"{name}: difference to production", gain.low >= -margin, text)


def same_classes(challenger: Encoder, champion: Encoder, allowed: bool) -> Iterator[Check]:
    """Yield a failed or allowed check if the two encoders' logits are of different lists of classes."""
    if challenger.classes != champion.classes:
        before, after = (", ".join(encoder.classes or ["none"]) for encoder in (champion, challenger))
        setting = f"promote.allow_other_classes={str(allowed).lower()}"
        yield Check("classes", allowed, f"{before} became {after}; {setting}")


def latency(challenger: Encoder, champion: Encoder | None, params: Params) -> Iterator[Check]:
    """Time single images at the challenger's image size, both encoders in turn."""
    p, side = params.promote, int(challenger.metadata.get("image_size", 224))
    encoders = [challenger] if champion is None else [challenger, champion]
    times: list[list[float]] = [[] for _ in encoders]
    for run in range(TIMED_RUNS + 1):
        for encoder, taken in zip(encoders, times, strict=True):
            start = time.perf_counter()
            encoder.embed(bands.noise(1, side, encoder.form))
            taken += [1000 * (time.perf_counter() - start)] * (run > 0)  # the first run allocates
    own, *others = map(statistics.median, times)
    text = f"{own:.2f} ms, at most promote.max_latency_ms={p.max_latency_ms:g}"
    yield Check("latency", own <= p.max_latency_ms, text)
    for other in others:
        text = f"{own / other:.2f} times production's {other:.2f} ms, at most {p.max_latency_ratio:g}"
        yield Check("latency: ratio", own <= p.max_latency_ratio * other, f"{text} (promote.max_latency_ratio)")


def reference(encoder: Encoder, n: int) -> Vectors:
    """Return the embeddings of `n` pretraining images, drawn with a fixed seed."""
    samples = webdataset.Samples(webdataset.tars("pretrain"))
    chosen = np.sort(np.random.default_rng(0).permutation(len(samples))[:n])
    return encoder.embed(bands.unpack(data) for data in samples.read(chosen))


def _at_least(name: str, value: float, bound: float, key: str) -> Check:
    return Check(name, value >= bound, f"{value:.6g}, at least {key}={bound:g}")  # a NaN does not pass
