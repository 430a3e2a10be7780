"""The Barlow Twins loss (Zbontar et al., arXiv 2103.03230, eqs. 1 and 2) over the global batch, in two exact forms.

With a, b (N, D) the two normalised embeddings and C = a^T b / N (D, D):

    loss = sum_i (1 - C_ii)^2  +  lambda * sum_{i != j} C_ij^2

The direct form builds C. The dual form never does: ||C||_F^2 = sum((a a^T) o (b b^T)) / N^2, where o is elementwise, so
the off-diagonal sum is ||C||_F^2 - sum_i C_ii^2 from two (N, N) Gram matrices: O(N^2 D) work instead of O(N D^2).

Between processes either C is summed, D^2 values, or the embeddings travel, 2 N D values; the rest is O(D). Nothing more
travels in the backward pass but O(D). Both the work and the bytes of the dual form are the smaller where N < D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from barlow import distributed
from barlow.distributed import Group

EPSILON = 1e-5  # under the square root, as batch norm has it
WIDE = 256  # D / N above which float32 does not do
Normalisation = Callable[[Tensor, Tensor, int, Group], tuple[Tensor, Tensor]]  # of `normalise`


class BarlowTwinsLoss(NamedTuple):
    """`total` = `on_diagonal` + lambda * `off_diagonal`, scalars; the two terms are equation 1's sums."""

    total: Float[Tensor, ""]
    on_diagonal: Float[Tensor, ""]
    off_diagonal: Float[Tensor, ""]


def barlow_twins_loss(
    z_a: Float[Tensor, "batch dim"],
    z_b: Float[Tensor, "batch dim"],
    lambd: float,
    group: Group = None,
    normalisation: Normalisation | None = None,
) -> BarlowTwinsLoss:
    """Compute the loss of two views' embeddings (batch, dim), in float32 or better whatever autocast says.

    Where torch.distributed is initialised the batch is that of all processes of `group`, and after the mean over
    processes that DistributedDataParallel takes, the gradient does not depend on how the batch was split.
    `normalisation` stands in for `normalise`.

    Raises:
        ValueError: the shapes differ, the batches of two processes differ, or the global batch has fewer than two
            samples.
    """
    if z_a.ndim != 2 or z_a.shape != z_b.shape:
        raise ValueError(f"z_a is {tuple(z_a.shape)} and z_b {tuple(z_b.shape)}; both must be (batch, dim)")
    n, dim = z_a.shape[0] * distributed.world_size(group), z_a.shape[1]
    distributed.require_equal(len(z_a), "the batch size", z_a.device, group)
    if n < 2:
        raise ValueError(f"the batch has {n} sample; normalisation over the batch needs at least 2")
    with torch.autocast(z_a.device.type, enabled=False):
        terms = _dual if form(n, dim) == "dual" else _direct
        a, b = (normalisation or normalise)(_wide(z_a, n), _wide(z_b, n), n, group)
        on_diagonal, off_diagonal = terms(a, b, n, group)
        return BarlowTwinsLoss(on_diagonal + lambd * off_diagonal, on_diagonal, off_diagonal)


def form(n: int, dim: int) -> str:
    """Return which form has less to compute and to send for a global batch of `n`: `dual` or `direct`."""
    return "dual" if n < dim else "direct"


def cross_correlation(z_a: Float[Tensor, "batch dim"], z_b: Float[Tensor, "batch dim"]) -> Float[Tensor, "dim dim"]:
    """Return the cross-correlation matrix C of two embeddings over the batch of all processes (equation 2)."""
    n = len(z_a) * distributed.world_size()
    a, b = normalise(z_a.float(), z_b.float(), n)
    return distributed.all_reduce(a.T @ b) / n


def normalise(z_a: Tensor, z_b: Tensor, n: int, group: Group = None) -> tuple[Tensor, Tensor]:
    """Return (z - mean) / sqrt(biased variance + 1e-5) of each view, statistics over the global batch of `n`."""
    means = distributed.all_reduce(torch.stack([z_a.sum(0), z_b.sum(0)]), group) / n
    z_a, z_b = z_a - means[0], z_b - means[1]
    variances = distributed.all_reduce(torch.stack([z_a.square().sum(0), z_b.square().sum(0)]), group) / n
    scales = (variances + EPSILON).rsqrt()
    return z_a * scales[0], z_b * scales[1]


def _direct(a: Tensor, b: Tensor, n: int, group: Group) -> tuple[Tensor, Tensor]:
    """Equation 1 as the paper writes it."""
    c = distributed.all_reduce(a.T @ b, group, replicated=True) / n  # (D, D), equation 2
    diagonal = c.diagonal()
    return (1 - diagonal).square().sum(), c.square().sum() - diagonal.square().sum()


def _dual(a: Tensor, b: Tensor, n: int, group: Group) -> tuple[Tensor, Tensor]:
    """The same without C."""
    diagonal = distributed.all_reduce((a * b).sum(0), group, replicated=True) / n  # (D,)
    frobenius = _Frobenius.apply(a, b, group) / n**2
    return (1 - diagonal).square().sum(), frobenius - diagonal.square().sum()


class _Frobenius(torch.autograd.Function):
    """||a^T b||_F^2 over the batch of all processes; each computes the rows of its own samples in the Gram matrices."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, group: Group) -> Tensor:
        all_a, all_b = distributed.all_gather(a, group), distributed.all_gather(b, group)
        gram_a, gram_b = a @ all_a.T, b @ all_b.T  # (n, N)
        ctx.save_for_backward(all_a, all_b, gram_a, gram_b)
        ctx.factor = 2 * distributed.world_size(group)  # for the mean over processes, see `distributed`
        return distributed.all_reduce((gram_a * gram_b).sum(), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        all_a, all_b, gram_a, gram_b = ctx.saved_tensors
        gradient = ctx.factor * gradient
        return gradient * gram_b @ all_a, gradient * gram_a @ all_b, None


def _wide(z: Tensor, n: int) -> Tensor:
    """Promote half precisions to float32, and all to float64 where a batch is tiny beside the dimension.

    There the gradient is a small difference of large terms, whose error in float32 grows with D / N: 5e-6 at 8192 / 8.
    float64 given by the caller stays.
    """
    wide = z.dtype == torch.float64 or z.shape[1] > WIDE * n
    return z.double() if wide else z.float()
