"""The measurements as the report shows them: methods, label budgets, confusion, classes, claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from barlow.evaluation import intervals, tables
from barlow.evaluation.figures import Accuracy, Budget, Evaluation, FineTuning
from barlow.reporting import charts, pictures

ENCODERS = {"pretrained": "pretrained", "random": "random encoder", "pixels": "raw pixels"}
NETWORKS = {"pretrained": "pretrained, then fine-tuned", "random": "from random weights"}
MISTAKES = 8  # kinds of mistake that are listed
LISTED_CLASSES = 15  # best classes that are listed, and as many worst ones


class Measured(NamedTuple):
    """An accuracy and its dotted name in its JSON file."""

    key: str
    accuracy: Accuracy


class Row(NamedTuple):
    """A label budget, and the linear probes that were fitted on it."""

    title: str
    images: int  # labelled ones
    budget: Budget | None  # None: all labels of train
    probes: dict[str, Measured]  # by encoder


def label_budgets(evaluation: Evaluation) -> list[Row]:
    """Return the measured label budgets, all labels of train among them, by rising number of images."""
    encoders = evaluation.encoders
    probes = {
        name: Measured(f"encoders.{name}.linear", scores.linear) for name, scores in encoders.items() if scores.linear
    }
    rows = [Row("all", evaluation.images.train, None, probes)] if probes else []
    budgets = {each.budget: each.images for scores in encoders.values() for each in scores.few_labels.values()}
    for budget, images in budgets.items():
        probes = {
            name: Measured(f"encoders.{name}.few_labels.{budget}.linear", scores.few_labels[str(budget)].linear)
            for name, scores in encoders.items()
            if str(budget) in scores.few_labels
        }
        rows.append(Row(str(budget), images, budget, probes))
    return sorted(rows, key=lambda row: tables.rising(row.budget, row.images) if row.budget else (row.images, False, 0))


def methods(evaluation: Evaluation, finetuning: FineTuning) -> list[dict[str, Any]]:
    """Return the accuracies in groups by the labels used: title, images and parts, {what learns: {method: Measured}}.

    The chart and its table alone show budgets of labels per class.
    """
    rows, encoders = label_budgets(evaluation), tables.titles(evaluation, ENCODERS)
    knn = {
        title: Measured(f"encoders.{name}.knn", scores.knn)
        for name, title in encoders.items()
        if (scores := evaluation.encoders.get(name)) and scores.knn
    }
    supervised = {}
    if finetuning.supervised:
        accuracy = finetuning.supervised.network.accuracy
        supervised["supervised network"] = Measured("supervised.network.accuracy", accuracy)

    def probes(budget: Budget | None) -> dict[str, Measured]:
        measured = next((row.probes for row in rows if row.budget == budget), {})
        return {title: measured[name] for name, title in encoders.items() if name in measured}

    frozen, whole = "Linear probe on frozen features", "The whole network, trained"
    parts = {frozen: probes(None), "Weighted kNN on frozen features": knn, whole: supervised}
    groups = [("All labels of train", evaluation.images.train, parts)]
    shares = {row.budget: row.images for row in rows if row.budget and row.budget.share}
    shares |= {each.budget: each.images for each in finetuning.fine_tuned.values()}
    for budget in sorted(shares, key=lambda budget: -budget.each):
        parts = {frozen: probes(budget), whole: _networks(finetuning, budget)}
        groups.append((f"{budget} of the labels", shares[budget], parts))
    return [
        {"title": title, "images": images, "parts": {part: rows for part, rows in parts.items() if rows}}
        for title, images, parts in groups
    ]


def _networks(finetuning: FineTuning, budget: Budget) -> dict[str, Measured]:
    each = finetuning.fine_tuned.get(str(budget))
    if not each:
        return {}
    networks = {"pretrained": each.pretrained, "random": each.random}
    return {
        title: Measured(f"fine_tuned.{budget}.{start}.accuracy", networks[start].accuracy)
        for start, title in NETWORKS.items()
    }


def few_labels(evaluation: Evaluation, finetuning: FineTuning, draws: Iterable[Sequence[str]]) -> dict[str, Any] | None:
    """Lay out the accuracy over the number of labelled images as a chart; None without labels.

    `draws` are rows of reports/few_labels.csv: encoder, budget, images, draw, top1.
    """
    single: dict[tuple[str, str], list[float]] = {}
    for encoder, budget, _, _, top1 in draws:
        single.setdefault((encoder, budget), []).append(float(top1))
    rows = label_budgets(evaluation)
    once = {row.images: row for row in reversed(rows)}  # of two budgets with as many images, the first

    def point(images: int, accuracy: Accuracy, dots: Sequence[float] = ()) -> charts.Point:
        return charts.Point(images, accuracy.top1, accuracy.low, accuracy.high, dots)

    series = {
        title: [
            point(images, row.probes[name].accuracy, single.get((name, str(row.budget)), ()))
            for images, row in sorted(once.items())
            if name in row.probes
        ]
        for name, title in tables.titles(evaluation, ENCODERS).items()
    }
    tuned = sorted(finetuning.fine_tuned.values(), key=lambda each: tables.rising(each.budget, each.images))
    for title in NETWORKS.values():
        series[title] = [point(each.images, _networks(finetuning, each.budget)[title].accuracy) for each in tuned]
    if finetuning.supervised:
        series["supervised"] = [point(evaluation.images.train, finetuning.supervised.network.accuracy)]
    series = {title: line for title, line in series.items() if line}
    return charts.points(series) if series else None


def confusion(pairs: Sequence[Sequence[str]], classes: list[str]) -> dict[str, Any] | None:
    """Count pairs (actual, predicted) of the test images' classes; None if nothing was predicted.

    `counts` and `shares` (of the actual class) are matrices [actual][predicted]; `mistakes` are the most frequent ones,
    each with the numbers of its images.
    """
    if not pairs:
        return None
    number = {name: i for i, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, tuple(np.array([[number[name] for name in pair] for pair in pairs]).T), 1)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    mistakes = Counter((pair[0], pair[1]) for pair in pairs if pair[0] != pair[1]).most_common(MISTAKES)
    where = {kind: [i for i, pair in enumerate(pairs) if tuple(pair) == kind] for kind, _ in mistakes}
    return {
        "classes": classes,
        "counts": counts.tolist(),
        "shares": shares.tolist(),
        "picture": pictures.matrix(shares, 0, 1, pictures.SHADES),
        "mistakes": [(*kind, where[kind]) for kind, _ in mistakes],
        "by_class": by_class(counts, classes),
    }


def by_class(counts: np.ndarray[Any, np.dtype[np.int64]], classes: list[str]) -> list[dict[str, Any]]:
    """Return recall with its interval, precision and test images of each class, the highest recall first."""
    rows = []
    for i, name in enumerate(classes):
        right, images, predicted = int(counts[i, i]), int(counts[i].sum()), int(counts[:, i].sum())
        if images:
            recall = 100 * right / images
            low, high = intervals.wilson_interval(recall, images)
            precision = 100 * right / predicted if predicted else None
            row = {"name": name, "recall": recall, "low": low, "high": high, "precision": precision, "images": images}
            rows.append(row)
    return sorted(rows, key=lambda row: (-row["recall"], row["name"]))


def ends(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return all rows as one list or, if there are many, the first and the last ones as two."""
    return [rows] if len(rows) <= 2 * LISTED_CLASSES else [rows[:LISTED_CLASSES], rows[-LISTED_CLASSES:]]


def claim(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Lay out a claim's points as rows over one axis; places are in percent of the axis' width."""
    measured = [point for point in entry["points"] if point.get("mean") is not None]
    dots = [[run["top1"] for run in point["runs"] if "failed" not in run] for point in measured]
    values = [point[key] for point in measured for key in ("mean", "low", "high")]
    values = values + [dot for row in dots for dot in row] or [0.0]
    margin = 0.06 * (max(values) - min(values)) or 1.0
    least, most = min(values) - margin, max(values) + margin

    def place(value: float) -> float:
        share: float = (value - least) / (most - least)
        return round(100 * share, 2)

    rows = []
    for point in entry["points"]:
        row = dict(point)
        if point in measured:
            row |= {key: (point[key], place(point[key])) for key in ("mean", "low", "high")}
            row["dots"] = [place(dot) for dot in dots[measured.index(point)]]
        rows.append(row)
    marks = [(place(value), f"{value:g}") for value in charts.ticks(least, most, 4)]
    return {
        **entry,
        "rows": rows,
        "marks": marks,
        "seeds": sorted({run["seed"] for p in entry["points"] for run in p["runs"]}),
    }
