"""Resume state: one safetensors file a checkpoint, whole or absent, the last two kept, nothing unpickled."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from barlow import model

KEPT = 2


def fingerprint(**parts: Any) -> str:
    """Hash what a run must have in common with the one it resumes, this package's code included."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def save(folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write the checkpoint of `step`, then delete all but the last two."""
    model.save_weights(folder / f"step-{step:09d}.safetensors", tensors, metadata | {"step": step})
    for old in _newest_first(folder)[KEPT:]:
        old.unlink()


def latest(folder: Path, expected: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return (tensors, metadata) of the newest whole checkpoint with the `expected` fingerprint.

    One that is damaged or of another run is skipped with a warning; None means a fresh start.
    """
    for path in _newest_first(folder):
        try:
            tensors, metadata = model.load_weights(path)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            print(f"warning: {path} is damaged ({error}); trying the one before it", file=sys.stderr)
            continue
        if metadata.get("fingerprint") == expected:
            return tensors, metadata
        print(f"warning: {path} is of a run with other params, data or code; not resumed", file=sys.stderr)
    return None


def clear(folder: Path) -> None:
    """Delete every checkpoint and keep the folder, which DVC expects to exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in _newest_first(folder):
        path.unlink()


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"), reverse=True)
