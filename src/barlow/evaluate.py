"""`barlow evaluate`: measure the frozen features, against a random network's, pixels and other weights'.

Reads data/features. Writes reports/evaluate.json, reports/few_labels.csv, reports/confusion.csv and
models/head.safetensors (the linear probe, which `export` puts into the ONNX file). docs/evaluation.md has the protocol
and its limits. Without labels, only the health of the features is measured.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from barlow.core import files, webdataset
from barlow.core.progress import shown
from barlow.core.weights import save_weights
from barlow.evaluation import features, intervals, probe, tables, verdict
from barlow.evaluation.features import Split
from barlow.evaluation.figures import Budget, Evaluation, FewLabels, Gain, Health, Images, Scores, write
from barlow.settings.params import Evaluate, Params
from barlow.training import health

SPLITS = ("train", "val", "test")
Labelled = tuple[Tensor, Tensor]  # features (n, dim), labels (n,)


class Draw(NamedTuple):
    """A linear probe fitted on one draw of labelled images: one row of reports/few_labels.csv."""

    budget: str
    images: int
    draw: int
    top1: float  # percent


class Result(NamedTuple):
    """One encoder's scores, probe, predictions and few-label draws; all but `knn_val` need labels in all splits."""

    scores: Scores  # without health
    head: dict[str, Tensor]  # weight (classes, dim) and bias (classes,) of the linear probe
    predictions: dict[str, Tensor]  # int64 (test images,), by "linear" and "knn"
    draws: list[Draw]


def run(params: Params) -> None:
    """Evaluate each encoder, write the metrics and print them as a table.

    Raises:
        UserError: `extract` has not run.
    """
    files.require(files.FEATURES, "extract")
    classes, results = webdataset.classes(), {}
    labels = {name: features.load("pretrained", name).labels for name in SPLITS}
    for encoder in features.kept():
        splits = {name: features.load(encoder, name) for name in SPLITS}
        results[encoder] = score(splits, len(classes), params.evaluate, encoder)
    evaluation = Evaluation(
        len(classes),
        Images(**{name: int((each >= 0).sum()) for name, each in labels.items()}),
        {name: replace(result.scores, health=measure_health(name)) for name, result in results.items()},
        gains({name: result.predictions for name, result in results.items()}, labels["test"]),
    )
    write(files.EVALUATION, evaluation)

    pretrained = results["pretrained"]
    save_weights(files.HEAD, pretrained.head, {"classes": classes if pretrained.head else []})
    draws = [(encoder, *draw) for encoder, result in results.items() for draw in result.draws]
    write_csv(files.FEW_LABELS, ("encoder", *Draw._fields), draws)
    predicted = pretrained.predictions.get("linear", torch.zeros(0)).tolist()
    pairs = zip(labels["test"].tolist(), predicted, strict=False)  # nothing predicted, no pair
    write_csv(files.CONFUSION, ("actual", "predicted"), ([classes[i] for i in pair] for pair in pairs))
    print(tables.table(evaluation, None), *verdict.lines(evaluation), sep="\n")


def score(splits: dict[str, Split], classes: int, p: Evaluate, encoder: str) -> Result:
    """Fit the probes and kNN on train, choose on val, and read test once each; `encoder` names the progress."""
    train, val, test = ((split.features.float(), split.labels) for split in splits.values())
    knn_val = None
    if all((labels >= 0).any() for _, labels in (train, val)):
        scores = probe.knn(val[0], *train, classes, p.knn_k, p.knn_temperature)
        knn_val = intervals.accuracy(scores.argmax(1) == val[1])
    if knn_val is None or not (test[1] >= 0).any():
        return Result(Scores(None, None, knn_val, None, {}, None), {}, {}, [])
    predicted = probe.predict(train, val, test[0], classes, p.probe_l2, p.knn_k, p.knn_temperature)
    predictions = {"linear": predicted.linear, "knn": predicted.knn}
    linear, knn = (intervals.accuracy(each == test[1]) for each in predictions.values())
    few_labels, draws = {}, list[Draw]()
    for budget in budgets(p) if p.draws else ():
        draws_of = shown(range(p.draws), f"{encoder}, {budget}", p.draws, "draw")
        fitted = [few_label_probe(train, val, test, classes, p, budget, draw) for draw in draws_of]
        top1 = intervals.mean_accuracy([draw.top1 for draw in fitted], len(test[1]))
        few_labels[str(budget)] = FewLabels(budget, fitted[0].images, top1)
        draws += fitted
    head = {"weight": predicted.weight, "bias": predicted.bias}
    return Result(Scores(linear, knn, knn_val, predicted.l2, few_labels, None), head, predictions, draws)


def gains(predictions: Mapping[str, Mapping[str, Tensor]], labels: Tensor) -> dict[str, dict[str, Gain]]:
    """Compare the pretrained encoder's predictions with each other encoder's, by "linear" and "knn"."""
    right = {name: {kind: each == labels for kind, each in kinds.items()} for name, kinds in predictions.items()}
    pretrained = right.pop("pretrained")
    return {
        name: {kind: intervals.gain(pretrained[kind], each) for kind, each in kinds.items() if kind in pretrained}
        for name, kinds in right.items()
        if kinds
    }


def few_label_probe(
    train: Labelled, val: Labelled, test: Labelled, classes: int, p: Evaluate, budget: Budget, draw: int
) -> Draw:
    """Fit a linear probe on one draw of labelled images, standardised by all images of train."""
    chosen = probe.draw_labels(train[1], budget.each, [p.seed, draw])
    few = (train[0][chosen], train[1][chosen])
    weight, bias, _ = probe.choose_linear(few, val, classes, p.probe_l2, unlabelled=train[0])
    return Draw(str(budget), len(chosen), draw, probe.accuracy((test[0] @ weight.T + bias).argmax(1), test[1]))


def budgets(p: Evaluate) -> list[Budget]:
    """Return the label budgets of the few-label probes."""
    return [Budget(count, None) for count in p.labels_per_class] + [Budget(None, share) for share in p.label_shares]


def measure_health(encoder: str) -> Health | None:
    """Measure what needs no labels of an encoder's features; pixels have no health."""
    if encoder == "pixels":
        return None
    whole, view_a, view_b = (features.load(encoder, name).features for name in ("health", "view_a", "view_b"))
    return Health(
        images=len(whole),
        effective_rank=health.effective_rank(whole),
        std=health.spread(whole),
        correlation=health.rms_correlation(whole),
        alignment=health.alignment(view_a, view_b),
        uniformity=health.uniformity(whole),
    )


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table, whole or not at all."""
    with files.replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
