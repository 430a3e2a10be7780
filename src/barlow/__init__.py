"""Barlow Twins, from unlabelled images to a served ONNX encoder.

    ingest -> validate -> shard -> pretrain -> extract -> evaluate, finetune -> export -> report

The names below are public. Each is imported at its first use, so `import barlow` loads neither torch nor onnxruntime.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from barlow.encoder.encoder import Encoder
    from barlow.training.loss import barlow_twins_loss, cross_correlation
    from barlow.training.optim import LARS, warmup_cosine
    from barlow.training.views import TwinViews

__version__ = "0.1.0"
__all__ = ["LARS", "Encoder", "TwinViews", "barlow_twins_loss", "cross_correlation", "warmup_cosine"]
_HOMES = {
    "Encoder": "encoder.encoder",
    "LARS": "training.optim",
    "TwinViews": "training.views",
    "barlow_twins_loss": "training.loss",
    "cross_correlation": "training.loss",
    "warmup_cosine": "training.optim",
}


if not TYPE_CHECKING:  # a type checker would take any misspelt name for a public one

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'barlow' has no attribute {name!r}")
        return getattr(import_module(f"barlow.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
