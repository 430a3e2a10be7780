"""The short runs of `barlow tune`: which settings they try, how many fit the time, and which of them is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, sqrt
from typing import Any

from barlow.settings.params import Params

FACTOR = 3.0  # by which learning rates and lambda are divided and multiplied
CROPS = (1 / 3, 2.0)  # the smallest crop's area, times these
CROP_BOUNDS = (0.08, 0.8)  # of that area: the smallest of published recipes, and nearly the whole image
STEPS = 100  # of a short run, at least, if fewer factors make it possible
GAIN = 0.05  # by which the effective rank must be higher, as a fraction: smaller differences come from the seed alone


Levels = dict[str, dict[str, Any]]  # values by dotted key, by label


@dataclass(frozen=True)
class Factor:
    """A setting to tune: its name, and the values to try besides the present one, by their labels."""

    name: str
    levels: Levels


@dataclass(frozen=True)
class Outcome:
    """What a short run came to."""

    effective_rank: float
    knn: float | None  # percent of val; None without labels
    images: int  # labelled ones of val


def factors(params: Params) -> list[Factor]:
    """Return what is tuned, the most important first. A level that equals the present value is left out."""
    p, (low, high) = params.pretrain, params.views.crop_area
    rates: Levels = {
        f"{p.lr_weights * by:.3g}": {
            "pretrain.lr_weights": _rounded(p.lr_weights * by),
            "pretrain.lr_biases": _rounded(p.lr_biases * by),
        }
        for by in (1 / FACTOR, FACTOR)
        if p.lr_weights * p.lr_biases
    }
    areas = (_rounded(min(max(low * by, CROP_BOUNDS[0]), CROP_BOUNDS[1], high)) for by in CROPS)
    crops: Levels = {crop_label([area, high]): {"views.crop_area": [area, high]} for area in areas if area != low}
    lambdas = (_rounded(p.lambd * by) for by in (1 / FACTOR, FACTOR) if p.lambd)
    weights: Levels = {f"{lambd:g}": {"pretrain.lambd": lambd} for lambd in lambdas}
    tried = {"learning rate": rates, "crop area": crops, "lambda": weights}
    return [Factor(name, levels) for name, levels in tried.items() if levels]


def present(params: Params) -> dict[str, str]:
    """Return the label of the present value, by the name of the factor."""
    return {
        "learning rate": f"{params.pretrain.lr_weights:.3g}",
        "crop area": crop_label(params.views.crop_area),
        "lambda": f"{params.pretrain.lambd:g}",
    }


def crop_label(area: Any) -> str:
    """Return a range of areas in words."""
    return f"{area[0]:g} to {area[1]:g}"


def plan(tried: list[Factor], epoch_seconds: float, epoch_steps: int, minutes: float, most: int) -> tuple[int, int]:
    """Return how many of the factors fit into the minutes, at least one, and the epochs of each run, at most `most`.

    The last factors are left out where a run would get fewer than STEPS steps.
    """
    for count in range(len(tried), 0, -1):
        runs = 1 + sum(len(factor.levels) for factor in tried[:count])
        epochs = min(max(floor(60 * minutes / runs / epoch_seconds), 1), most)
        if epochs * epoch_steps >= min(STEPS, most * epoch_steps) and runs * epochs * epoch_seconds <= 60 * minutes:
            break
    return count, epochs


def better(outcomes: Mapping[str, Outcome | None], now: str, by_labels: bool) -> str:
    """Return the label of the best run; `now`, the present value's, unless another is better by more than chance.

    With labels, by kNN on val: by more than the standard error of an accuracy. Without, by the effective rank: by more
    than GAIN. A run that failed (None) is worse than any.
    """

    def figure(outcome: Outcome) -> float:
        return (outcome.knn or 0.0) if by_labels else outcome.effective_rank

    done = {label: outcome for label, outcome in outcomes.items() if outcome is not None}
    if not done:
        return now
    best = max(done, key=lambda label: figure(done[label]))
    if (here := done.get(now)) is None:
        return best
    share = (here.knn or 0.0) / 100
    chance = 100 * sqrt(share * (1 - share) / max(here.images, 1)) if by_labels else GAIN * here.effective_rank
    return best if figure(done[best]) > figure(here) + chance else now


def _rounded(value: float) -> float:
    """Return three significant digits: what a person would write."""
    return float(f"{value:.3g}")
