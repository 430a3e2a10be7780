"""The Barlow Twins loss (Zbontar et al., arXiv 2103.03230, eqs. 1 and 2) over the global batch, in two exact forms.

    loss = invariance + lambda * redundancy
    invariance = sum_i (1 - C_ii)^2
    redundancy = sum_{i != j} C_ij^2

C = a^T b / N (D, D) is the cross-correlation of the two normalised embeddings a and b (N, D).

The direct form builds C. The dual form does not: ||C||_F^2 = sum((a a^T) o (b b^T)) / N^2, where o is elementwise. So
redundancy = ||C||_F^2 - sum_i C_ii^2 comes from two (N, N) Gram matrices, in O(N^2 D) work instead of O(N D^2).

Between processes, the direct form sums C (D^2 values) and the dual form gathers the embeddings (2 N D values). All
other traffic, that of the backward pass included, is O(D). For N < D the dual form has less work and less traffic.

The gradient is derived by hand, to pass over (N, D) arrays as few times as possible. With G = dL/dC:

    dL/da = b G^T / N,  dL/db = a G / N

and through the normalisation a = (z - mean) * s, per dimension (the mean of dL/da is 0, since b is centred):

    dL/dz = s * (dL/da - a * mean(dL/da * a))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from barlow.settings.params import Ablation
from barlow.training import distributed

EPSILON = 1e-5  # under the square root, as batch norm has it
WIDE = 256  # D / N above which float32 is not precise enough


class BarlowTwinsLoss(NamedTuple):
    """The two terms of equation 1 and `total` = `invariance` + lambda * `redundancy`, all scalars."""

    total: Float[Tensor, ""]
    invariance: Float[Tensor, ""]
    redundancy: Float[Tensor, ""]


def barlow_twins_loss(
    z_a: Float[Tensor, "batch dim"], z_b: Float[Tensor, "batch dim"], lambd: float
) -> BarlowTwinsLoss:
    """Compute the loss of two views' embeddings (batch, dim), in float32 or float64 even under autocast.

    Where torch.distributed is initialised, the batch is that of all processes together. DistributedDataParallel takes
    the mean of the gradients over processes; that mean does not depend on how the batch was split.

    Raises:
        ValueError: the shapes differ, the batches of two processes differ, or the global batch has fewer than two
            samples.
    """
    n, dim = batch(z_a, z_b)
    with torch.autocast(z_a.device.type, enabled=False):
        invariance, redundancy = _Terms.apply(wide(z_a, n), wide(z_b, n), form(n, dim) == "dual")
        return BarlowTwinsLoss(invariance + lambd * redundancy, invariance, redundancy)


def batch(z_a: Tensor, z_b: Tensor) -> tuple[int, int]:
    """Return (samples in the global batch, dim); raises as `barlow_twins_loss` does."""
    if z_a.ndim != 2 or z_a.shape != z_b.shape:
        raise ValueError(f"z_a is {tuple(z_a.shape)} and z_b {tuple(z_b.shape)}; both must be (batch, dim)")
    distributed.require_equal(len(z_a), "the batch size", z_a.device)
    n = len(z_a) * distributed.world_size()
    if n < 2:
        raise ValueError(f"the batch has {n} sample; normalisation over the batch needs at least 2")
    return n, z_a.shape[1]


def form(n: int, dim: int) -> str:
    """Return the cheaper form, `dual` or `direct`, for a global batch of `n` samples."""
    return "dual" if n < dim else "direct"


def cross_correlation(z_a: Float[Tensor, "batch dim"], z_b: Float[Tensor, "batch dim"]) -> Float[Tensor, "dim dim"]:
    """Return the cross-correlation matrix C of two embeddings over the batch of all processes (equation 2)."""
    n = len(z_a) * distributed.world_size()
    a, b, _ = normalise(z_a.float(), z_b.float(), n)
    return distributed.all_reduce(a.T @ b) / n


def normalise(z_a: Tensor, z_b: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (z - mean) * s of both views and s (2, dim) = 1 / sqrt(biased variance + 1e-5), over a global batch."""
    means = distributed.all_reduce(torch.stack([z_a.sum(0), z_b.sum(0)])) / n
    z_a, z_b = z_a - means[0], z_b - means[1]
    squares = torch.stack([z.square().sum(0) for z in (z_a, z_b)])  # a sum in pairs, unlike a norm's
    scales = (distributed.all_reduce(squares) / n + EPSILON).rsqrt()
    return z_a.mul_(scales[0]), z_b.mul_(scales[1]), scales


class _Terms(torch.autograd.Function):
    """Invariance and redundancy of two embeddings, which are normalised here.

    Of the Gram matrices, as of the gradient, each process computes the rows of its own samples.
    """

    @staticmethod
    def forward(ctx: Any, z_a: Tensor, z_b: Tensor, dual: bool) -> tuple[Tensor, Tensor]:
        n = len(z_a) * distributed.world_size()
        a, b, scales = normalise(z_a, z_b, n)
        ctx.n, ctx.dual = n, dual
        if dual:
            all_a, all_b = distributed.all_gather(a), distributed.all_gather(b)
            gram_a, gram_b = a @ all_a.T, b @ all_b.T  # (batch, N)
            sums = torch.cat([(a * b).sum(0), (gram_a * gram_b).sum()[None]])
            sums = distributed.all_reduce(sums)
            diagonal, frobenius = sums[:-1] / n, sums[-1] / n**2  # (dim,) and ||C||_F^2
            ctx.save_for_backward(a, b, scales, diagonal, gram_a, gram_b, all_a, all_b)
        else:
            c = distributed.all_reduce(a.T @ b) / n  # (dim, dim), equation 2
            diagonal, frobenius = c.diagonal(), c.square().sum()
            ctx.save_for_backward(a, b, scales, diagonal, c)
        return (1 - diagonal).square().sum(), frobenius - diagonal.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_invariance: Tensor, d_redundancy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b, scales, diagonal, *rest = ctx.saved_tensors
        n, world = ctx.n, distributed.world_size()  # world undoes the mean that is taken over processes
        d_diagonal = (-2 * world / n) * (
            d_invariance * (1 - diagonal) + d_redundancy * diagonal
        )  # (dim,), besides b G^T
        factor = (2 * world / n) * d_redundancy
        gradients: dict[int, Tensor] = {}
        for i in filter(ctx.needs_input_grad.__getitem__, (0, 1)):
            if ctx.dual:
                gram_a, gram_b, all_a, all_b = rest
                gradients[i] = (gram_b @ all_a if i == 0 else gram_a @ all_b).mul_(factor / n)
            else:
                (c,) = rest
                gradients[i] = (b @ c.T if i == 0 else a @ c).mul_(factor)
            gradients[i].addcmul_((b, a)[i], d_diagonal)
        # mean(dL/da * a), over the global batch
        own = torch.stack([(gradient * (a, b)[i]).sum(0) for i, gradient in gradients.items()])
        for (i, gradient), mean in zip(gradients.items(), distributed.all_reduce(own) / n, strict=True):
            gradient.addcmul_((a, b)[i], mean, value=-1).mul_(scales[i])
        return gradients.get(0), gradients.get(1), None


def wide(z: Tensor, n: int) -> Tensor:
    """Return z in float64 if it is so already or D / N is above WIDE, else in float32.

    With few samples per dimension the gradient is a small difference of large terms. Its error in float32 grows with
    D / N: 5e-6 at 8192 / 8.
    """
    return z.double() if z.dtype == torch.float64 or z.shape[1] > WIDE * n else z.float()


def ablated_loss(
    z_a: Float[Tensor, "batch dim"],
    z_b: Float[Tensor, "batch dim"],
    lambd: float,
    ablate: Ablation | None,
) -> BarlowTwinsLoss:
    """Compute the loss with one change to the method (`pretrain.ablate`, for `barlow claims`); None changes nothing.

    normalisation: the embeddings are neither centred nor scaled, C = z_a^T z_b / N.
    invariance: lambda * redundancy alone is minimised. (To leave redundancy out, set lambda to 0.)
    stop-gradient: view B's embeddings are constants; the gradient flows through view A alone. The symmetric variant
        would be no test: by the chain rule its gradient is half of the whole one, and LARS undoes a factor.

    Returns both terms even where only one is minimised.
    """
    if ablate == "normalisation":
        n, _ = batch(z_a, z_b)
        with torch.autocast(z_a.device.type, enabled=False):
            c = distributed.all_reduce(wide(z_a, n).T @ wide(z_b, n), replicated=True) / n
        invariance, redundancy = (1 - c.diagonal()).square().sum(), (c - c.diagonal().diag()).square().sum()
        return BarlowTwinsLoss(invariance + lambd * redundancy, invariance, redundancy)
    loss = barlow_twins_loss(z_a, z_b.detach() if ablate == "stop-gradient" else z_b, lambd)
    return loss._replace(total=lambd * loss.redundancy) if ablate == "invariance" else loss
