"""Read weights files of others, which nobody vouches for: no code in them runs, and every fault is one clear line."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from barlow.core.errors import UserError

DEPTH = 4  # of dictionaries in dictionaries, as in checkpoints: {"teacher": {"backbone.conv1.weight": ...}}
ENTRIES = 100_000  # of them all, at most


def read(path: Path, given: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or PyTorch file by name; dictionaries in it are joined by dots.

    The content, not the ending, says which kind of file it is.

    Args:
        path: the file.
        given: the setting and its value, for messages, such as `model.weights=a.pth`.

    Raises:
        UserError: the file is damaged, holds more than plain tensors, or no tensors at all.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
        tensors = _safetensors(path) if head[8:] == b"{" else _pytorch(path)
    except UserError as error:
        raise UserError(f"{given} {error}") from None
    except Exception as error:  # a damaged file fails in many ways
        if found := re.search(r"(?:GLOBAL|instance of) ([\w.]+)", str(error)):
            raise UserError(
                f"{given} holds a Python object ({found.group(1)}), and to unpickle that could run its code; it was "
                "not read; save the tensors alone: torch.save(network.state_dict(), PATH)"
            ) from None
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{given} is no whole safetensors or PyTorch file ({text:.120}); copy it again from where it came"
        ) from None
    if not tensors:
        raise UserError(f"{given} holds no tensors by name; give a state dict")
    return tensors


def _safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:  # checks that the header's offsets fit the file
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _pytorch(path: Path) -> dict[str, Tensor]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        # torch stores tensors as they are, so a file that would grow when it is read is not torch's.
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
            raise UserError("is a compressed archive, which torch.save does not write, so it was not read")
    content = torch.load(path, map_location="cpu", weights_only=True)
    return dict(_named(content, "", [0], DEPTH))


def _named(content: Any, prefix: str, count: list[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items() if isinstance(content, dict) and depth else ():
        count[0] += 1
        if count[0] > ENTRIES:
            raise UserError(f"holds more than {ENTRIES:,} entries, which no network has")
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value.detach()
        else:
            yield from _named(value, f"{prefix}{name}.", count, depth - 1)
