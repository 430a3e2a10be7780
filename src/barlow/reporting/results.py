"""What was measured, as the report tells it: methods, few labels, confusion, classes, claims."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from barlow.evaluation import intervals, tables
from barlow.reporting import charts, pictures

Metrics = Mapping[str, float]
ENCODERS = {"": "pretrained", "random_": "random encoder", "pixels_": "raw pixels"}
NETWORKS = {"finetuned_": "pretrained, then fine-tuned", "scratch_": "from random weights"}
MISTAKES = 8  # kinds of mistake that are listed
CLASSES = 15  # best, and as many worst, of the classes where there are more than twice as many


def settings(metrics: Metrics) -> dict[str, tuple[str, int]]:
    """Return title and labelled images of each few-label setting, and of `linear`, all labels, by rising number."""
    found = {"linear": ("all", int(metrics.get("train_images", 0)))}
    for name, images in tables.few_labels(metrics).items():
        kind, _, amount = name.partition("_")
        found[name] = (f"{amount} a class" if kind == "labels" else f"{amount} %", images)
    measured = {name: value for name, value in found.items() if f"{name}_top1" in metrics}
    return dict(sorted(measured.items(), key=lambda item: (item[1][1], item[0])))


def methods(metrics: Metrics) -> list[dict[str, Any]]:
    """Return every accuracy in groups by the labels used, each by what learns from them, each {key: method}."""

    def each(names: Mapping[str, str], setting: str) -> dict[str, str]:
        return {key: name for prefix, name in names.items() if (key := f"{prefix}{setting}_top1") in metrics}

    supervised = {"supervised_top1": "supervised network"} if "supervised_top1" in metrics else {}
    frozen, whole = "Linear probe on frozen features", "The whole network, trained"
    knn = each(ENCODERS, "knn")
    parts = {frozen: each(ENCODERS, "linear"), "Weighted kNN on frozen features": knn, whole: supervised}
    groups = [("All labels of train", int(metrics.get("train_images", 0)), parts)]
    known = settings(metrics)
    shares = {m[1] for key in metrics if (m := re.fullmatch(r"(?:finetuned_|scratch_)?(share_.+)_top1", key))}
    for share in sorted(shares, key=lambda name: -float(name.removeprefix("share_"))):
        parts = {frozen: each(ENCODERS, share), whole: each(NETWORKS, share)}
        title = f"{share.removeprefix('share_')} % of the labels"
        groups.append((title, known[share][1] if share in known else 0, parts))
    return [
        {"title": title, "images": images, "parts": {part: rows for part, rows in parts.items() if rows}}
        for title, images, parts in groups
    ]


def few_labels(metrics: Metrics, draws: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Return the chart of accuracy over labelled images, and the settings of its table; None and none without labels.

    `draws` are rows of reports/few_labels.csv: encoder, setting, images, draw, top1.
    """
    single: dict[tuple[str, str], list[float]] = {}
    for encoder, setting, _, _, top1 in draws:
        single.setdefault((encoder, setting), []).append(float(top1))
    known = settings(metrics)
    once = {images: name for name, (_, images) in reversed(known.items())}  # of two with as many images, the first

    def point(key: str, images: int, dots: Sequence[float] = ()) -> charts.Point:
        return charts.Point(images, metrics[key], metrics[f"{key}_low"], metrics[f"{key}_high"], dots)

    series = {}
    for prefix, title in ENCODERS.items():
        dots = {name: single.get((prefix.rstrip("_") or "pretrained", name), ()) for name in known}
        places = [(f"{prefix}{name}_top1", images, dots[name]) for images, name in sorted(once.items())]
        series[title] = [point(*place) for place in places if place[0] in metrics]
    for prefix, title in NETWORKS.items():
        shares = [(f"{prefix}{name}_top1", images) for name, (_, images) in known.items()]
        series[title] = [point(*place) for place in shares if place[0] in metrics]
    series["supervised"] = (
        [point("supervised_top1", known["linear"][1])] if {"supervised_top1", "linear_top1"} <= {*metrics} else []
    )
    series = {title: line for title, line in series.items() if line}
    return {
        "chart": charts.points(series) if series else None,
        "settings": [(title, images, name) for name, (title, images) in known.items()],
    }


def confusion(pairs: Sequence[Sequence[str]], classes: list[str]) -> dict[str, Any] | None:
    """Return what (actual, predicted) classes of the test images come to; None where nothing was predicted.

    `counts` and `shares` of the actual class are (actual, predicted); `mistakes` are the most frequent, each with the
    numbers of its images.
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
    """Return recall with its interval, precision and images of each class in the test split, the best first."""
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
    """Return all rows as one list, or where there are many the first and the last ones."""
    return [rows] if len(rows) <= 2 * CLASSES else [rows[:CLASSES], rows[-CLASSES:]]


def claim(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a claim's points out as rows over one axis; places are in percent of its width."""
    measured = [point for point in entry["points"] if point.get("mean") is not None]
    dots = [[run[entry["metric"]] for run in point["runs"] if entry["metric"] in run] for point in measured]
    seen = [point[key] for point in measured for key in ("mean", "low", "high")] + [dot for row in dots for dot in row]
    seen = seen or [0.0]
    margin = 0.06 * (max(seen) - min(seen)) or 1.0
    least, most = min(seen) - margin, max(seen) + margin

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
