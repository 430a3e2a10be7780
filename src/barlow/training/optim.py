"""The optimizers, LARS by the rule of the official Barlow Twins code, and the learning rate: warm-up, then cosine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from barlow.settings import params

BETA2 = 0.999  # of AdamW, as in torch


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), multi-tensor.

    For a parameter w with gradient g:

        d = g + weight_decay * w
        d = d * trust_coefficient * |w| / |d|   (not where either norm is 0)
        m = momentum * m + d
        w = w - lr * m

    Parameters with ndim <= 1 (biases, norms) take neither decay nor scaling. Each setting may differ between parameter
    groups. Each operation is one fused launch per group; no value is read back from the device.

    `clip` is solo-learn's `clip_lr` (solo/utils/lars.py): d is scaled by min(trust_coefficient * |w| / |d| / lr, 1), so
    the step is min(trust_coefficient * |w| / |d|, lr) * d and lr is an upper bound. (solo-learn has
    |g| + weight_decay * |w| for |d|.) With `clip`, a loss scaled by s equals lr, of weights and biases, multiplied by s
    and weight_decay divided by s.

    Raises:
        ValueError: a setting is negative.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 0.001,
        clip: bool = False,
    ) -> None:
        settings = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        for name, value in settings.items():
            if value < 0:
                raise ValueError(f"{name}={value} is negative; it must be at least 0")
        super().__init__(params, settings | {"clip": clip})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [w for w in group["params"] if w.grad is not None]
            for adapt in (True, False):
                weights = [w for w in with_gradient if (w.ndim > 1) == adapt]
                if weights:
                    self._update(weights, group, adapt)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any], adapt: bool) -> None:
        updates: list[Tensor] = [w.grad for w in weights if w.grad is not None]
        if adapt:
            updates = list(torch._foreach_add(updates, weights, alpha=group["weight_decay"]))
            w_norm = torch.stack(torch._foreach_norm(weights))
            d_norm = torch.stack(torch._foreach_norm(updates))
            trust = group["trust_coefficient"] * w_norm / d_norm
            scaled = (w_norm > 0) & (d_norm > 0)
            if group["clip"]:
                scaled &= trust < group["lr"]  # false at lr = 0, where the quotient below is infinite or NaN
                trust = trust / group["lr"]
            trust = torch.where(scaled, trust, 1.0)
            torch._foreach_mul_(updates, list(trust.unbind()))
        for w in weights:
            if "momentum_buffer" not in self.state[w]:
                self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        buffers = [self.state[w]["momentum_buffer"] for w in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(weights, buffers, alpha=-group["lr"])


def build(p: params.Pretrain, weights: list[Tensor], biases: list[Tensor]) -> torch.optim.Optimizer:
    """Return `pretrain.optimizer`: `weights` decay; `biases`, and the weights of norms among them, do not.

    Its learning rate is 0, for the schedule to set. Its whole state exists from the start, all zeros, which is what
    each optimizer begins with. So the checkpoint of any step holds the same tensors.
    """
    groups = [{"params": weights, "weight_decay": p.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer
    if p.optimizer == "adamw":  # Loshchilov and Hutter, arXiv 1711.05101
        optimizer, moments = torch.optim.AdamW(groups, 0.0, (p.momentum, BETA2), fused=True), ["exp_avg", "exp_avg_sq"]
    elif p.optimizer == "sgd":
        optimizer, moments = torch.optim.SGD(groups, 0.0, p.momentum, fused=True), ["momentum_buffer"]
    else:
        clip = p.optimizer == "larc"
        optimizer = LARS(groups, 0.0, p.momentum, trust_coefficient=p.trust_coefficient, clip=clip)
        moments = ["momentum_buffer"]
    for w in weights + biases:
        optimizer.state[w] = {name: torch.zeros_like(w) for name in moments}
        if p.optimizer == "adamw":
            optimizer.state[w]["step"] = torch.zeros((), device=w.device)
    return optimizer


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, base: float, final: float) -> float:
    """Return the learning rate of `step`, counted from 0 (Loshchilov and Hutter, arXiv 1608.03983; paper, sec. 2.2).

    The rate rises linearly from 0 at step 0 to `base` at `warmup_steps`, then falls along half a cosine to `final` at
    `total_steps`, one step past the last.
    """
    if step < warmup_steps:
        return base * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * progress))
