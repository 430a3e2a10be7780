"""Whether a run has enough steps to learn anything."""

from __future__ import annotations

FEW = 500


def warning(steps: int, epochs: int) -> str | None:
    """Return a line that says that a run's steps are few; None if there are at least FEW."""
    if steps >= FEW:
        return None
    text = "1 step is" if steps == 1 else f"{steps} steps are"
    return f"{text} few: an encoder usually needs thousands; raise pretrain.epochs={epochs}"
