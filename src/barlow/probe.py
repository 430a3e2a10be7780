"""What frozen features are worth: linear probe, weighted kNN, confidence intervals and label-free health."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Features = Float[Tensor, "batch dim"]
Labels = Int[Tensor, " batch"]


def fit_linear(features: Features, labels: Labels, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Fit multinomial logistic regression by L-BFGS on standardised features.

    Minimises the mean cross-entropy + l2 / 2 * ||W||^2, where W acts on features of zero mean and unit deviation.

    Returns:
        weight (classes, dim) and bias (classes,) for the features as they came, the standardisation folded in.
    """
    mean, deviation = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    x = (features - mean) / deviation
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    folded = weight.detach() / deviation
    return folded, bias.detach() - folded @ mean


def choose_linear(
    train: tuple[Float[Tensor, "train dim"], Int[Tensor, " train"]],
    val: tuple[Float[Tensor, "val dim"], Int[Tensor, " val"]],
    classes: int,
    l2s: tuple[float, ...],
) -> tuple[Tensor, Tensor, float]:
    """Fit on `train` once for each of `l2s` and return (weight, bias, l2) of the one that is best on `val`."""

    def val_accuracy(l2: float) -> tuple[float, float]:
        weight, bias = fitted[l2]
        logits = val[0] @ weight.T + bias
        return accuracy(logits.argmax(1), val[1]), -float(functional.cross_entropy(logits, val[1]))

    fitted = {l2: fit_linear(*train, classes, l2) for l2 in l2s}
    best = max(fitted, key=val_accuracy)
    return *fitted[best], best


def knn(
    queries: Float[Tensor, "queries dim"],
    bank: Float[Tensor, "bank dim"],
    labels: Int[Tensor, " bank"],
    classes: int,
    k: int,
    temperature: float,
) -> Float[Tensor, "queries {classes}"]:
    """Score classes by the k nearest of `bank` in cosine similarity s, each with weight exp(s / temperature).

    The weighted kNN of Wu et al., arXiv 1805.01978, section 3.4.
    """
    bank = functional.normalize(bank).T
    scores = []
    for chunk in torch.split(functional.normalize(queries), 1024):
        similarity, nearest = (chunk @ bank).topk(min(k, bank.shape[1]))
        votes = torch.zeros(len(chunk), classes, device=chunk.device)
        scores.append(votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp()))
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
