"""Metrics as tables: for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from barlow.evaluation.figures import Accuracy, Budget, Candidate, Evaluation, FineTuning

COLUMNS = {"pretrained": "pretrained", "random": "random encoder", "pixels": "pixels"}


def table(evaluation: Evaluation, finetuning: FineTuning | None) -> str:
    """Return the headline as text: pretrained against both baselines, top-1 in percent with 95 % intervals."""
    lines = [f"{'':<26}" + "".join(f"{title:>22}" for title in COLUMNS.values())]
    for title, accuracies in rows(evaluation, finetuning).items():
        cells = (str(accuracies.get(encoder, "")) for encoder in COLUMNS)
        lines.append(f"{title:<26}" + "".join(f"{cell:>22}" for cell in cells).rstrip())
    if len(lines) == 1:
        lines.append("train, val or test has no labels: only the health of the features was measured")
    health = [scores.health if (scores := evaluation.encoders.get(name)) else None for name in COLUMNS]
    for key in ("effective_rank", "alignment", "uniformity"):
        cells = (f"{getattr(each, key):.2f}" if each else "" for each in health)
        lines.append(f"{key.replace('_', ' '):<26}" + "".join(f"{cell:>22}" for cell in cells).rstrip())
    return "\n".join(lines)


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
