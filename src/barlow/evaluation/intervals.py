"""95 % confidence intervals of accuracies, in percent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats
from torch import Tensor

from barlow.evaluation.figures import Accuracy, Gain


def wilson_interval(percent: float, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of an accuracy in percent over `n` images (Wilson, 1927)."""
    z, p = 1.959964, percent / 100
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return 100 * max(centre - half, 0), 100 * min(centre + half, 1)


def mean_interval(percents: Sequence[float], n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of repeated accuracies in percent, all over the same `n` images.

    Student's t over the repetitions (label draws, seeds) and, in quadrature, the error of `n` test images, which no
    repetition makes smaller: law of total variance. One repetition leaves Wilson's interval.
    """
    mean, k = math.fsum(percents) / len(percents), len(percents)
    low, high = wilson_interval(mean, n)
    repeated = float(stats.t.ppf(0.975, k - 1) * np.std(percents, ddof=1) / math.sqrt(k)) if k > 1 else 0.0
    return max(mean - math.hypot(mean - low, repeated), 0.0), min(mean + math.hypot(high - mean, repeated), 100.0)


def mean_accuracy(percents: Sequence[float], n: int) -> Accuracy:
    """Return the mean of repeated accuracies in percent, all over the same `n` images, with its interval."""
    low, high = mean_interval(percents, n)
    return Accuracy(math.fsum(percents) / len(percents), low, high)


def accuracy(right: Tensor) -> Accuracy:
    """Return an accuracy with its interval; `right` says of each image whether its class was predicted, bool (n,)."""
    return mean_accuracy([100 * float(right.double().mean())], len(right))


def paired_interval(better: int, worse: int, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the difference of two accuracies over the same `n` images, in points.

    `better` images only the first predicts right, `worse` only the second. The adjusted Wald interval of Bonett and
    Price, J. Educ. Behav. Stat. 37(4), 2012; with no discordant image it is not empty but some points wide.
    """
    first, second = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    half = 1.959964 * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    return 100 * max(first - second - half, -1), 100 * min(first - second + half, 1)


def gain(right: Tensor, other: Tensor) -> Gain:
    """Return how far one encoder is above another; bool (n,) each, whether an image's class was predicted right."""
    better, worse = int((right & ~other).sum()), int((~right & other).sum())
    return Gain(100 * (better - worse) / len(right), *paired_interval(better, worse, len(right)))
