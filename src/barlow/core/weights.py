"""Weights in files: safetensors with JSON metadata. So no weights file is ever unpickled, which would run its code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from barlow.core import files


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors as safetensors with JSON metadata, whole or not at all."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with files.replacing(path) as temporary:
        temporary.write_bytes(save(contiguous, {"barlow": json.dumps(metadata, sort_keys=True)}))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote: (tensors, metadata)."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["barlow"])  # noqa: SIM118


def load_metadata(path: Path) -> dict[str, Any]:
    """Read only the metadata of a file that `save_weights` wrote."""
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, Any] = json.loads(file.metadata()["barlow"])
    return metadata
