"""Metrics as tables: for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from barlow.evaluation.figures import Accuracy, Budget, Candidate, Evaluation, FineTuning

TITLES = {"pretrained": "pretrained", "random": "random encoder", "pixels": "pixels"}
WIDTH = 22  # characters of a column, at least


def table(evaluation: Evaluation, finetuning: FineTuning | None) -> str:
    """Return the headline as text: pretrained against all others, top-1 in percent with 95 % intervals."""
    columns = titles(evaluation)

    def line(title: str, cells: Iterable[str]) -> str:
        widths = (max(WIDTH, len(column) + 2) for column in columns.values())
        return f"{title:<26}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()

    lines = [line("", columns.values())]
    for title, accuracies in rows(evaluation, finetuning).items():
        lines.append(line(title, (str(accuracies.get(name, "")) for name in columns)))
    if len(lines) == 1:
        lines.append("train, val or test has no labels: only the health of the features was measured")
    health = [scores.health if (scores := evaluation.encoders.get(name)) else None for name in columns]
    for key in ("effective_rank", "alignment", "uniformity"):
        lines.append(line(key.replace("_", " "), (f"{getattr(each, key):.2f}" if each else "" for each in health)))
    return "\n".join(lines)


def titles(evaluation: Evaluation, known: Mapping[str, str] = TITLES) -> dict[str, str]:
    """Return the encoders in their order, with their titles: the known ones, then others by name."""
    return {**known, **{name: name for name in sorted(evaluation.encoders) if name not in known}}


def rows(evaluation: Evaluation, finetuning: FineTuning | None) -> dict[str, dict[str, Accuracy]]:
    """Return the accuracies that were measured, by row title and then by column; rising in the labels they need."""
    encoders = evaluation.encoders
    by_title = {
        "linear probe": {name: scores.linear for name, scores in encoders.items()},
        "weighted kNN": {name: scores.knn for name, scores in encoders.items()},
    }
    few = {each.budget: each.images for scores in encoders.values() for each in scores.few_labels.values()}
    for budget in sorted(few, key=lambda budget: rising(budget, few[budget])):
        of_encoders = {name: scores.few_labels.get(str(budget)) for name, scores in encoders.items()}
        by_title[words(budget)] = {name: each.linear if each else None for name, each in of_encoders.items()}
    if finetuning:
        for each in sorted(finetuning.fine_tuned.values(), key=lambda each: rising(each.budget, each.images)):
            networks = {"pretrained": each.pretrained.accuracy, "random": each.random.accuracy}
            by_title[f"fine-tuned, {words(each.budget)}"] = {**networks}
        if finetuning.supervised:
            by_title["supervised, all labels"] = {"random": finetuning.supervised.network.accuracy}
    measured = {
        title: {name: accuracy for name, accuracy in columns.items() if accuracy} for title, columns in by_title.items()
    }
    return {title: columns for title, columns in measured.items() if columns}


def rising(budget: Budget, images: int) -> tuple[int, bool, float]:
    """Return the sort key of a label budget: its images, then per class before shares."""
    return images, budget.per_class is None, budget.each


def words(budget: Budget) -> str:
    """Put a label budget into words."""
    if budget.per_class is None:
        return f"{budget} of labels"
    return f"{budget.per_class} label{'s' if budget.per_class != 1 else ''} per class"


def columns(candidates: Mapping[str, Candidate]) -> str:
    """Return what the gate measured of encoders, by name, as Markdown: one column per encoder, one row per figure."""
    lines = [f"| | {' | '.join(candidates)} |", f"|---|{'---|' * len(candidates)}"]
    for key, title in {"logits": "classifier", "linear": "linear probe", "knn": "weighted kNN"}.items():
        accuracies = [getattr(each, key) for each in candidates.values()]
        if any(accuracies):
            lines.append(f"| {title} | {' | '.join(str(each or '') for each in accuracies)} |")
    for key, title in {"effective_rank": "effective rank", "std": "standard deviation"}.items():
        lines.append(f"| {title} | {' | '.join(f'{getattr(each, key):.4g}' for each in candidates.values())} |")
    return "\n".join(lines)
