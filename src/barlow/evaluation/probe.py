"""What frozen features are worth: linear probe, weighted kNN, confidence intervals and label-free health."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor
from torch.nn import functional

Features = Float[Tensor, "batch dim"]
Labels = Int[Tensor, " batch"]


def fit_linear(
    features: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    classes: int,
    l2s: Sequence[float],
    unlabelled: Float[Tensor, "unlabelled dim"] | None = None,
) -> dict[float, tuple[Tensor, Tensor]]:
    """Fit multinomial logistic regression on standardised features, once for each of `l2s`, by L-BFGS.

    Minimises the mean cross-entropy + l2 / 2 * ||W||^2, where W acts on features of zero mean and unit deviation over
    `unlabelled`, or over `features` where it is None. Each l2 starts from the solution of the next larger one.

    Returns:
        for each l2, weight (classes, dim) and bias (classes,) for the features as they came, standardisation folded in.
    """
    reference = features if unlabelled is None else unlabelled
    mean, deviation = reference.mean(0), reference.std(0, correction=0).clamp_min(1e-6)
    x = (features - mean) / deviation
    basis = 1 / deviation  # what turns weights of the problem that is solved into those of the features
    if len(x) < x.shape[1]:  # the solution lies in the span of the samples: fewer unknowns, the same optimum
        u, values, directions = torch.linalg.svd(x, full_matrices=False)
        x, basis = u * values, directions / deviation
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    fitted = {}
    for l2 in sorted(l2s, reverse=True):
        _minimise(x, labels, weight, bias, l2)
        folded = weight.detach() * basis if basis.ndim == 1 else weight.detach() @ basis
        fitted[l2] = folded, bias.detach() - folded @ mean
    return fitted


def _minimise(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, l2: float) -> None:
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def choose_linear(
    train: tuple[Float[Tensor, "train dim"], Int[Tensor, " train"]],
    val: tuple[Float[Tensor, "val dim"], Int[Tensor, " val"]],
    classes: int,
    l2s: Sequence[float],
    unlabelled: Float[Tensor, "unlabelled dim"] | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Fit on `train` once for each of `l2s` and return (weight, bias, l2) of the one that is best on `val`."""

    def val_accuracy(l2: float) -> tuple[float, float]:
        weight, bias = fitted[l2]
        logits = val[0] @ weight.T + bias
        return accuracy(logits.argmax(1), val[1]), -float(functional.cross_entropy(logits, val[1]))

    fitted = fit_linear(*train, classes, l2s, unlabelled)
    best = max(fitted, key=val_accuracy)
    return *fitted[best], best


def draw_labels(labels: Labels, each: float | int, seed: Sequence[int]) -> Int[Tensor, " drawn"]:
    """Draw images of every class: `each` of them, or all there are; below 1, that share of them, one at least.

    Returns the numbers of the drawn images, in ascending order.
    """
    rng, drawn = np.random.default_rng([*seed, round(1e6 * each)]), []
    for label in sorted(set(labels.tolist())):
        of_class = (labels == label).nonzero().flatten().numpy()
        wanted = round(each * len(of_class)) if each < 1 else min(round(each), len(of_class))
        drawn.append(rng.choice(of_class, max(wanted, 1), replace=False))
    return torch.from_numpy(np.sort(np.concatenate(drawn)))


def knn(
    queries: Float[Tensor, "queries dim"],
    bank: Float[Tensor, "bank dim"],
    labels: Int[Tensor, " bank"],
    classes: int,
    k: int,
    temperature: float,
) -> Float[Tensor, "queries {classes}"]:
    """Score classes by the k nearest of `bank` in cosine similarity s, each with weight exp((s - s_1) / temperature).

    s_1 is the nearest one's: scores compare within a query, not between queries. The weighted kNN of Wu et al.,
    arXiv 1805.01978, section 3.4.
    """
    bank = functional.normalize(bank).T
    scores = []
    for chunk in torch.split(functional.normalize(queries), 1024):
        similarity, nearest = (chunk @ bank).topk(min(k, bank.shape[1]))
        votes = torch.zeros(len(chunk), classes, device=chunk.device)
        # Each row's weights over that of its nearest, or exp(1 / temperature) is infinite in float32 from 1/88 down.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        scores.append(votes.scatter_add_(1, labels[nearest], weights))
    return torch.cat(scores)


class Predictions(NamedTuple):
    """Classes of the test images, int64 (test,), by two readings of frozen features, and the linear one's weights."""

    linear: Tensor
    knn: Tensor
    weight: Tensor  # (classes, dim)
    bias: Tensor  # (classes,)
    l2: float


def predict(
    train: tuple[Float[Tensor, "train dim"], Int[Tensor, " train"]],
    val: tuple[Float[Tensor, "val dim"], Int[Tensor, " val"]],
    test: Float[Tensor, "test dim"],
    classes: int,
    l2s: tuple[float, ...],
    k: int,
    temperature: float,
) -> Predictions:
    """Learn from `train` alone, choose the probe's l2 on `val`, and predict `test` once."""
    weight, bias, l2 = choose_linear(train, val, classes, l2s)
    neighbours = knn(test, *train, classes, k, temperature).argmax(1)
    return Predictions((test @ weight.T + bias).argmax(1), neighbours, weight, bias, l2)


def accuracy(predictions: Labels, labels: Labels) -> float:
    """Return the share of right predictions, in percent."""
    return 100 * float((predictions == labels).double().mean())


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


def figure(name: str, percents: Sequence[float], n: int) -> dict[str, float]:
    """Return the mean of repeated accuracies over `n` images under `name`, with its `_low` and `_high`."""
    low, high = mean_interval(percents, n)
    return {name: math.fsum(percents) / len(percents), f"{name}_low": low, f"{name}_high": high}


def paired_interval(better: int, worse: int, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the difference of two accuracies over the same `n` images, in points.

    `better` images only the first predicts right, `worse` only the second. The adjusted Wald interval of Bonett and
    Price, J. Educ. Behav. Stat. 37(4), 2012; with no discordant image it is not empty but some points wide.
    """
    first, second = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    half = 1.959964 * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    return 100 * max(first - second - half, -1), 100 * min(first - second + half, 1)


def effective_rank(features: Features) -> float:
    """Return exp of the entropy of the normalised singular values (RankMe: Garrido et al., arXiv 2210.02885, eq. 1)."""
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def spread(features: Features) -> float:
    """Return the mean standard deviation of unit features times sqrt(dim): 1 is even, 0 collapsed.

    Chen and He, arXiv 2011.10566, section 4.1.
    """
    return float(functional.normalize(features.float()).std(0, correction=0).mean() * features.shape[1] ** 0.5)


def alignment(view_a: Features, view_b: Features) -> float:
    """Return the mean squared distance of two views' features on the unit sphere, 0 to 4; lower is more invariant.

    Wang and Isola, arXiv 2005.10242, section 4.1.
    """
    distance = functional.normalize(view_a) - functional.normalize(view_b)
    return float(distance.square().sum(1).mean())


def uniformity(features: Features) -> float:
    """Return log E exp(-2 |x - y|^2) over pairs on the unit sphere; lower is more spread out (same paper)."""
    distances = torch.pdist(functional.normalize(features))
    return float((-2 * distances.square()).exp().mean().log())


def redundancy(features: Features) -> float:
    """Return the root mean square correlation between two different dimensions, 0 to 1; constant ones count as 0.

    What the redundancy-reduction term drives down in the embedding (Zbontar et al., arXiv 2103.03230, eq. 1), here of
    the representation.
    """
    x = features.double() - features.double().mean(0)
    x = functional.normalize(x, dim=0)
    correlation, dim = x.T @ x, x.shape[1]
    off_diagonal = correlation.square().sum() - correlation.diagonal().square().sum()
    return float((off_diagonal / max(dim * (dim - 1), 1)).sqrt())
