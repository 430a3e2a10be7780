"""`barlow evaluate`: what the frozen features are worth, against those of a random network and against pixels.

Reads data/features. Writes reports/evaluate.json, reports/few_labels.csv, reports/confusion.csv and
models/head.safetensors (the linear probe, which `export` puts into the ONNX file). The protocol, and what it does not
show, is in docs/evaluation.md. Without labels only the health figures remain.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from barlow.core import files, webdataset
from barlow.core.weights import save_weights
from barlow.evaluation import features, intervals, probe, tables
from barlow.evaluation.features import Split
from barlow.settings.params import Evaluate, Params
from barlow.training import health

PREFIXES = {"random": "random_", "pixels": "pixels_", "pretrained": ""}  # of the figures' names; what is kept is last's


class Scores(NamedTuple):
    """What the labelled splits say of an encoder; empty where one of them has no labels."""

    metrics: dict[str, float]
    head: dict[str, Tensor]  # weight (classes, dim) and bias (classes,) of the linear probe
    predictions: Tensor  # int64 (test images,), the linear probe's
    draws: list[tuple[str, int, int, float]]  # setting, labelled images, number of the draw, top-1 in percent


def run(params: Params) -> None:
    """Evaluate the three kinds of features, write the figures and print them as a table.

    Raises:
        UserError: `extract` has not run.
    """
    p, classes = params.evaluate, webdataset.classes()
    metrics: dict[str, float] = {"classes": len(classes)}
    draws = []
    prefixes = PREFIXES if params.extract.baselines else {"pretrained": ""}
    for encoder, prefix in prefixes.items():
        splits = {name: features.load(encoder, name) for name in ("train", "val", "test")}
        scores = score(splits, len(classes), p)
        figures = scores.metrics | (health_of(encoder) if encoder != "pixels" else {})
        metrics |= {prefix + name: value for name, value in figures.items()}
        draws += [(encoder, *draw) for draw in scores.draws]
    labelled = {name: int((split.labels >= 0).sum()) for name, split in splits.items()}
    metrics |= {f"{name}_images": count for name, count in labelled.items()}
    metrics |= {f"{setting}_images": count for _, setting, count, *_ in draws}

    save_weights(files.HEAD, scores.head, {"classes": classes if scores.head else []})
    write_csv(files.FEW_LABELS, ("encoder", "setting", "images", "draw", "top1"), draws)
    pairs = zip(splits["test"].labels.tolist(), scores.predictions.tolist(), strict=False)  # nothing predicted, no pair
    write_csv(files.CONFUSION, ("actual", "predicted"), ([classes[i] for i in pair] for pair in pairs))
    files.write_json(files.REPORTS / "evaluate.json", metrics)
    print(tables.table(metrics))


def score(splits: dict[str, Split], classes: int, p: Evaluate) -> Scores:
    """Fit the probes and kNN on train, choose on val, and read test once each."""
    if not all((split.labels >= 0).any() for split in splits.values()):
        return Scores({}, {}, torch.zeros(0, dtype=torch.long), [])
    train, val, test = ((split.features.float(), split.labels) for split in splits.values())
    predicted = probe.predict(train, val, test[0], classes, p.probe_l2, p.knn_k, p.knn_temperature)
    metrics = {"linear_l2": predicted.l2}
    for name, predictions in {"linear": predicted.linear, "knn": predicted.knn}.items():
        metrics |= intervals.figure(f"{name}_top1", [probe.accuracy(predictions, test[1])], len(test[1]))
    draws = []
    for name, each in settings(p).items():
        top1 = []
        for draw in range(p.draws):
            chosen = probe.draw_labels(train[1], each, [p.seed, draw])
            few = (train[0][chosen], train[1][chosen])
            weight, bias, _ = probe.choose_linear(few, val, classes, p.probe_l2, unlabelled=train[0])
            top1.append(probe.accuracy((test[0] @ weight.T + bias).argmax(1), test[1]))
            draws.append((name, len(chosen), draw, top1[-1]))
        if top1:
            metrics |= intervals.figure(f"{name}_top1", top1, len(test[1]))
    return Scores(metrics, {"weight": predicted.weight, "bias": predicted.bias}, predicted.linear, draws)


def settings(p: Evaluate) -> dict[str, int | float]:
    """Return how many labels the few-label probes get, by their names: a number a class, or a share of all."""
    each = {f"labels_{count}": count for count in p.labels_per_class}
    return each | {f"share_{100 * share:g}": share for share in p.label_shares}


def health_of(encoder: str) -> dict[str, float]:
    """Return what needs no label."""
    whole, view_a, view_b = (features.load(encoder, name).features for name in ("health", "view_a", "view_b"))
    return {
        "health_images": len(whole),
        "effective_rank": health.effective_rank(whole),
        "feature_std": health.spread(whole),
        "feature_correlation": health.rms_correlation(whole),
        "alignment": health.alignment(view_a, view_b),
        "uniformity": health.uniformity(whole),
    }


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table, whole or not at all."""
    with files.replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
