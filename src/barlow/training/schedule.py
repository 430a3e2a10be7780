"""The learning rate: linear warm-up, then half a cosine (Loshchilov and Hutter, arXiv 1608.03983; paper, sec. 2.2)."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, base: float, final: float) -> float:
    """Return the learning rate of `step`, counted from 0.

    It rises from 0 at step 0 to `base` at `warmup_steps` and falls to `final` at `total_steps`, one past the last.
    """
    if step < warmup_steps:
        return base * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * progress))
