"""Linear probe and weighted kNN on frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Labels = Int[Tensor, " batch"]

ROUNDING = 8  # units in the last place that equal values may differ by


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
    mean, deviation = reference.mean(0), scale(reference)
    x = (features - mean) / deviation
    basis = 1 / deviation  # what turns weights of the problem that is solved into those of the features
    if len(x) < x.shape[1]:  # the solution lies in the span of the samples: fewer unknowns, the same optimum
        u, values, directions = torch.linalg.svd(x, full_matrices=False)
        # svd gives u by columns; the products of L-BFGS are 18 times faster by rows
        x, basis = (u * values).contiguous(), directions / deviation
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    fitted = {}
    for l2 in sorted(l2s, reverse=True):
        _minimise(x, labels, weight, bias, l2)
        folded = weight.detach() * basis if basis.ndim == 1 else weight.detach() @ basis
        fitted[l2] = folded, bias.detach() - folded @ mean
    return fitted


def scale(features: Float[Tensor, "batch dim"]) -> Float[Tensor, " dim"]:
    """Return the standard deviation of each feature, or 1 where the feature is constant but for float32's rounding.

    To divide by such a deviation would blow rounding errors up to unit size, and the probe would learn them.
    """
    deviation = features.double().std(0, correction=0).float()
    rounding = ROUNDING * torch.finfo(torch.float32).eps * features.abs().amax(0)
    return torch.where(deviation <= rounding, 1.0, deviation)


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
    """Draw labelled images of every class; return their numbers in ascending order.

    `each` of at least 1 is a number of images per class (at most all of them); below 1, a share (at least one image).
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

    s_1 is the similarity of the nearest: scores compare within a query, not between queries. The weighted kNN of Wu et
    al., arXiv 1805.01978, section 3.4.
    """
    bank = functional.normalize(bank).T
    scores = []
    for chunk in torch.split(functional.normalize(queries), 1024):
        similarity, nearest = (chunk @ bank).topk(min(k, bank.shape[1]))
        votes = torch.zeros(len(chunk), classes, device=chunk.device)
        # Over the nearest one's weight: exp(1 / temperature) alone overflows float32 at temperatures below 1/88.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        scores.append(votes.scatter_add_(1, labels[nearest], weights))
    return torch.cat(scores)


class Predictions(NamedTuple):
    """Predicted classes of the test images, int64 (test,), by linear probe and by kNN; and the probe itself."""

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
