"""Figures as tables: for a terminal, and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping


def table(metrics: Mapping[str, float]) -> str:
    """Return the headline figures, pretrained against both baselines, as text: top-1 in percent, 95 % intervals."""
    lines = [f"{'':<26}" + "".join(f"{name:>22}" for name in ("pretrained", "random encoder", "pixels"))]
    for name, text in rows(metrics):
        keys = columns_of(name)
        cells = [
            f"{metrics[k]:.1f} ({metrics[f'{k}_low']:.1f} to {metrics[f'{k}_high']:.1f})" if k in metrics else ""
            for k in keys
        ]
        lines.append(f"{text:<26}" + "".join(f"{cell:>22}" for cell in cells).rstrip())
    if len(lines) == 1:
        lines.append("no labels in each of train, val and test: only the health of the features can be told")
    for name in ("effective_rank", "alignment", "uniformity"):
        if name in metrics:
            values = (metrics[key] for key in (name, f"random_{name}") if key in metrics)
            lines.append(f"{name.replace('_', ' '):<26}" + "".join(f"{value:>22.2f}" for value in values))
    return "\n".join(lines)


def rows(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the name of each accuracy that was measured, without `_top1`, and what to call it."""
    few = few_labels(metrics)
    calls = {"linear": "linear probe", "knn": "weighted kNN", **{name: few_words(name) for name in few}}
    calls |= {f"finetuned_{name}": f"fine-tuned, {few_words(name)}" for name in few}
    calls["supervised"] = "supervised, all labels"
    return [(name, text) for name, text in calls.items() if f"{name}_top1" in metrics]


def few_labels(metrics: Mapping[str, float]) -> dict[str, int]:
    """Return the few-label settings by name, `labels_N` or `share_N`, with their labelled images, by rising number."""
    found = {
        name.removesuffix("_images"): int(images)
        for name, images in metrics.items()
        if re.fullmatch(r"(labels|share)_.+_images", name)
    }
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def columns_of(name: str) -> list[str]:
    """Return the keys of an accuracy for the pretrained encoder, the random one and pixels."""
    if name == "supervised":
        return ["", "supervised_top1", ""]
    if name.startswith("finetuned_"):
        return [f"{name}_top1", f"{name.replace('finetuned', 'scratch')}_top1", ""]
    return [f"{prefix}{name}_top1" for prefix in ("", "random_", "pixels_")]


def few_words(name: str) -> str:
    """Put the name of a few-label setting into words."""
    kind, _, number = name.partition("_")
    if kind == "share":
        return f"{number} % of labels"
    return f"{number} label{'s' if number != '1' else ''} a class"


def columns(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Return figures of several encoders, by name, as a Markdown table: a column an encoder, a row a figure."""
    rows = [f"| | {' | '.join(figures)} |", f"|---|{'---|' * len(figures)}"]
    for key in sorted({key for column in figures.values() for key in column if not key.endswith(("_low", "_high"))}):
        cells = []
        for column in figures.values():
            interval = f" ({column[f'{key}_low']:.1f} to {column[f'{key}_high']:.1f})" if f"{key}_low" in column else ""
            cells.append(f"{column[key]:.4g}{interval}" if key in column else "")
        rows.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(rows)
