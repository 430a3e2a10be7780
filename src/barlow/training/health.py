"""Health of embeddings, measured without labels: effective rank, spread, alignment, uniformity, correlation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Features = Float[Tensor, "batch dim"]

FEW_STEPS = 500  # below, a run has hardly learned anything


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
    """Return log E exp(-2 |x - y|^2) over pairs on the unit sphere; lower is more even (same paper)."""
    distances = torch.pdist(functional.normalize(features))
    return float((-2 * distances.square()).exp().mean().log())


def rms_correlation(features: Features) -> float:
    """Return the root mean square correlation between two different dimensions, 0 to 1; constant ones count as 0.

    The redundancy term of the loss (Zbontar et al., arXiv 2103.03230, eq. 1) drives this down in the embedding; here it
    is measured on the representation.
    """
    x = features.double() - features.double().mean(0)
    x = functional.normalize(x, dim=0)
    correlation, dim = x.T @ x, x.shape[1]
    off_diagonal = correlation.square().sum() - correlation.diagonal().square().sum()
    return float((off_diagonal / max(dim * (dim - 1), 1)).sqrt())


def few_steps(steps: int, epochs: int) -> str | None:
    """Return a line that says that a run's steps are few; None if there are at least FEW_STEPS."""
    if steps >= FEW_STEPS:
        return None
    text = "1 step is" if steps == 1 else f"{steps} steps are"
    return f"{text} few: an encoder usually needs thousands; raise pretrain.epochs={epochs}"
