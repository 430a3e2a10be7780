"""The loss with something left out of the method, or added to it: `pretrain.ablate`, for `barlow claims`.

normalisation: the embeddings are neither centred nor scaled, C = z_a^T z_b / N.
invariance: the loss is lambda * off_diagonal alone. (lambda = 0 leaves out redundancy reduction.)
stop-gradient: view B's embeddings are constants, so that the gradient flows through view A alone. One-sided on purpose:
    symmetrised, half of each direction, the gradient is by the chain rule exactly half of the whole one, and LARS
    undoes a factor.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from barlow.settings.params import Ablation
from barlow.training import distributed
from barlow.training.distributed import Group
from barlow.training.loss import BarlowTwinsLoss, barlow_twins_loss, batch, wide


def ablated_loss(
    z_a: Float[Tensor, "batch dim"],
    z_b: Float[Tensor, "batch dim"],
    lambd: float,
    ablate: Ablation | None,
    group: Group = None,
) -> BarlowTwinsLoss:
    """Compute `barlow_twins_loss` without, or with, what `ablate` names.

    Both terms are returned even where only one is minimised.
    """
    if ablate == "normalisation":
        n, _ = batch(z_a, z_b, group)
        with torch.autocast(z_a.device.type, enabled=False):
            c = distributed.all_reduce(wide(z_a, n).T @ wide(z_b, n), group, replicated=True) / n
        on_diagonal, off_diagonal = (1 - c.diagonal()).square().sum(), (c - c.diagonal().diag()).square().sum()
        return BarlowTwinsLoss(on_diagonal + lambd * off_diagonal, on_diagonal, off_diagonal)
    loss = barlow_twins_loss(z_a, z_b.detach() if ablate == "stop-gradient" else z_b, lambd, group)
    return loss._replace(total=lambd * loss.off_diagonal) if ablate == "invariance" else loss
