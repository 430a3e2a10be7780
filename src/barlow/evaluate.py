"""`barlow evaluate`: what the frozen encoder is worth, against a random one of the same shape.

Reads models/encoder.safetensors and data/shards/{train,val,test}-*.tar. Writes reports/evaluate.json,
reports/confusion.csv, models/head.safetensors (the linear probe, which `export` puts into the ONNX file) and
data/features.safetensors (the test images' features, for the report).

Protocol: features are the backbone's, of the whole image resized, with no augmentation. The probe's l2 is chosen on
val; the probe and kNN learn from train alone; test is predicted once. Without labels only the health figures remain.
"""

from __future__ import annotations

import csv
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from barlow import files, model, probe, shards, summary
from barlow.features import CHUNK, Split, embed, labelled
from barlow.params import Evaluate, Params, Views
from barlow.views import TwinViews

MIN_HEALTH_IMAGES = 100  # in val; with fewer the health figures come from pretrain
HEALTH_IMAGES = 2000  # that the health figures look at; pairwise distances cost its square


class Scores(NamedTuple):
    """What the labelled splits say of an encoder; empty where one of them has no labels."""

    metrics: dict[str, float]
    head: dict[str, Tensor]  # weight (classes, dim) and bias (classes,) of the linear probe
    predictions: Tensor  # int64 (test images,), the linear probe's


def run(params: Params) -> None:
    """Evaluate the pretrained and the random encoder, write the figures and print them as a table.

    Raises:
        UserError: there is no encoder, or no shards.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = model.load_encoder()[0].to(device)
    torch.manual_seed(params.evaluate.seed)
    random = model.FrozenEncoder(params.model, params.views).to(device)
    classes = shards.classes()

    metrics: dict[str, float] = {"classes": len(classes)}
    for prefix, network in {"random_": random, "": encoder}.items():
        splits = {name: embed(network, labelled(name), device) for name in ("train", "val", "test")}
        scores = score(splits, len(classes), params.evaluate)
        figures = scores.metrics | health(network, params.views, params.evaluate.seed, device)
        metrics |= {prefix + name: value for name, value in figures.items()}
    metrics |= {f"{name}_images": len(split.keys) for name, split in splits.items()}

    model.save_weights(files.HEAD, scores.head, {"classes": classes if scores.head else []})
    test = splits["test"]
    if not test.keys:  # nearest neighbours tell something without labels too
        test = embed(encoder, islice(shards.read(shards.tars("test")), HEALTH_IMAGES), device)
    metadata = {"keys": test.keys, "classes": classes}
    model.save_weights(files.FEATURES, {"features": test.features, "labels": test.labels}, metadata)
    with files.replacing(files.CONFUSION) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["actual", "predicted"])
        if scores.head:
            for pair in zip(test.labels.tolist(), scores.predictions.tolist(), strict=True):
                rows.writerow(classes[i] for i in pair)
    files.write_json(files.REPORTS / "evaluate.json", metrics)
    print(summary.table(metrics))


def score(splits: dict[str, Split], classes: int, p: Evaluate) -> Scores:
    """Fit the probe and kNN on train, choose on val, and read test once."""
    if not all(len(split.keys) for split in splits.values()):
        return Scores({}, {}, torch.zeros(0, dtype=torch.long))
    train, val, test = ((split.features, split.labels) for split in splits.values())
    predicted = probe.predict(train, val, test[0], classes, p.probe_l2, p.knn_k, p.knn_temperature)
    metrics = {"linear_l2": predicted.l2}
    for name, predictions in {"linear": predicted.linear, "knn": predicted.knn}.items():
        top1 = probe.accuracy(predictions, test[1])
        low, high = probe.wilson_interval(top1, len(predictions))
        metrics |= {f"{name}_top1": top1, f"{name}_top1_low": low, f"{name}_top1_high": high}
    return Scores(metrics, {"weight": predicted.weight, "bias": predicted.bias}, predicted.linear)


def health(encoder: model.FrozenEncoder, views: Views, seed: int, device: torch.device) -> dict[str, float]:
    """Return what needs no label, from up to 2,000 images held out, or trained on where too few are held out."""
    tars = shards.tars("val")
    if shards.count(tars) < MIN_HEALTH_IMAGES:
        tars = shards.tars("pretrain")
    features = embed(encoder, islice(shards.read(tars), HEALTH_IMAGES), device).features
    batch = min(len(features), CHUNK)
    with torch.inference_mode():
        twins = islice(TwinViews(tars, views, batch, seed), max(len(features) // batch, 1))
        pairs = [[encoder.backbone(view.to(device)).cpu() for view in pair] for pair in twins]
        view_a, view_b = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return {
        "health_images": len(features),
        "effective_rank": probe.effective_rank(features),
        "feature_std": probe.spread(features),
        "alignment": probe.alignment(view_a, view_b),
        "uniformity": probe.uniformity(features),
    }
