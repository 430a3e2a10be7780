"""The Barlow Twins loss (Zbontar et al., arXiv 2103.03230, eqs. 1 and 2) over the global batch, in two exact forms.

With a, b (N, D) the two normalised embeddings and C = a^T b / N (D, D):

    loss = sum_i (1 - C_ii)^2  +  lambda * sum_{i != j} C_ij^2

The direct form builds C. The dual form never does: ||C||_F^2 = sum((a a^T) o (b b^T)) / N^2, where o is elementwise, so
the off-diagonal sum is ||C||_F^2 - sum_i C_ii^2 from two (N, N) Gram matrices: O(N^2 D) work instead of O(N D^2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from barlow import distributed
from barlow.distributed import Group

EPSILON = 1e-5  # under the square root, as batch norm has it


class BarlowTwinsLoss(NamedTuple):
    """`total` = `on_diagonal` + lambda * `off_diagonal`, scalars; the two terms are equation 1's sums."""

    total: Float[Tensor, ""]
    on_diagonal: Float[Tensor, ""]
    off_diagonal: Float[Tensor, ""]


def barlow_twins_loss(
    z_a: Float[Tensor, "batch dim"], z_b: Float[Tensor, "batch dim"], lambd: float, group: Group = None
) -> BarlowTwinsLoss:
    """Compute the loss of two views' embeddings (batch, dim), in float32 whatever autocast says.

    Where torch.distributed is initialised the batch is that of all processes of `group`, and after the mean over
    processes that DistributedDataParallel takes, the gradient does not depend on how the batch was split.

    Raises:
        ValueError: the shapes differ, or the global batch has fewer than two samples.
    """
    if z_a.ndim != 2 or z_a.shape != z_b.shape:
        raise ValueError(f"z_a is {tuple(z_a.shape)} and z_b {tuple(z_b.shape)}; both must be (batch, dim)")
    n, dim = z_a.shape[0] * distributed.world_size(group), z_a.shape[1]
    if n < 2:
        raise ValueError(f"the batch has {n} sample; normalisation over the batch needs at least 2")
    with torch.autocast(z_a.device.type, enabled=False):
        terms = _dual if n < dim else _direct
        on_diagonal, off_diagonal = terms(_float(z_a), _float(z_b), n, group)
        return BarlowTwinsLoss(on_diagonal + lambd * off_diagonal, on_diagonal, off_diagonal)


def cross_correlation(z_a: Float[Tensor, "batch dim"], z_b: Float[Tensor, "batch dim"]) -> Float[Tensor, "dim dim"]:
    """Return the cross-correlation matrix C of two embeddings over this process's batch (equation 2)."""
    n = len(z_a)
    return normalise(_float(z_a), n).T @ normalise(_float(z_b), n) / n


def normalise(z: Float[Tensor, "batch dim"], n: int, group: Group = None) -> Float[Tensor, "batch dim"]:
    """Return (z - mean) / sqrt(biased variance + 1e-5), statistics over the global batch of `n` samples."""
    z = z - distributed.all_reduce(z.sum(0), group) / n
    variance = distributed.all_reduce(z.square().sum(0), group) / n
    return z * (variance + EPSILON).rsqrt()


def _direct(z_a: Tensor, z_b: Tensor, n: int, group: Group) -> tuple[Tensor, Tensor]:
    """Equation 1 as the paper writes it; between processes, C travels."""
    c = distributed.all_reduce(normalise(z_a, n, group).T @ normalise(z_b, n, group), group) / n  # (D, D), eq. 2
    diagonal = c.diagonal()
    off_diagonal = c.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum(), off_diagonal


def _dual(z_a: Tensor, z_b: Tensor, n: int, group: Group) -> tuple[Tensor, Tensor]:
    """The same from Gram matrices; between processes, the embeddings travel."""
    a, b = (normalise(z, n, group) for z in (z_a, z_b))
    a, b = (distributed.all_gather(x, group) for x in (a, b))
    diagonal = (a * b).sum(0) / n  # (D,)
    frobenius = ((a @ a.T) * (b @ b.T)).sum() / n**2
    return (1 - diagonal).square().sum(), frobenius - diagonal.square().sum()


def _float(z: Tensor) -> Tensor:
    """Promote half precisions to float32; float64 stays, for whoever checks this against it."""
    return z if z.dtype == torch.float64 else z.float()
