"""Checkpoints: one folder per run, one safetensors file per checkpoint, whole or absent; the last two are kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from barlow.core.errors import UserError
from barlow.core.weights import load_metadata, load_weights, save_weights

FOLDER = Path("models/resume")
KEPT = 2
TOLD = 5  # differing settings that a message names
DAMAGED = (SafetensorError, OSError, KeyError, TypeError, ValueError)  # raised by reading a damaged file


def folder(identity: Mapping[str, Any]) -> Path:
    """Return the folder of a run, named by a hash of all that decides its weights: settings, data and code."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return FOLDER / digest[:16]


def save(folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write the checkpoint of `step`, then delete all but the last two of this run.

    Raises:
        UserError: the disk is full; names the path and the bytes needed. Earlier checkpoints stay.
    """
    path = folder / f"step-{step:09d}.safetensors"
    try:
        save_weights(path, tensors, metadata | {"step": step})
    except OSError as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise UserError(
            f"{path} cannot be written ({error.strerror}): it needs {needed:,} bytes and {_free(folder):,} are free; "
            f"make room and run again, to go on from {newest(folder) or 'the start'}"
        ) from None
    for old in [*_newest_first(folder)[KEPT:], *folder.glob(".step-*.tmp")]:  # .tmp: left by a process that was killed
        old.unlink()


class Writer:
    """Writes checkpoints in a thread, one at a time, while training goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Copy the tensors on their device and let the thread write the copies; raises what the last save raised."""
        self.wait()
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        ready = torch.cuda.current_stream().record_event() if next(iter(copies.values())).is_cuda else None
        self._last = self._thread.submit(self._write, step, copies, metadata, ready)

    def _write(self, step: int, copies: dict[str, Tensor], metadata: dict[str, Any], ready: Any) -> None:
        """Write the copies; from a GPU they are fetched in a stream of their own, beside that of training."""
        stream = nullcontext() if ready is None else torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        with stream:
            if ready is not None:
                ready.wait()
            save(self._folder, step, {name: copy.cpu() for name, copy in copies.items()}, metadata)

    def check(self) -> None:
        """Raise what the last save raised, if it has ended."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save has ended; raises what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def newest(folder: Path) -> Path | None:
    """Return the path of a run's newest checkpoint, if there is one."""
    return next(iter(_newest_first(folder)), None)


def latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return (tensors, metadata) of a run's newest whole checkpoint, None if there is none; warns of damaged ones."""
    for path in _newest_first(folder):
        try:
            tensors, metadata = load_weights(path)
            metadata["step"] += 0  # raises if there is no such number, so the file is not ours
        except DAMAGED as error:
            print(f"warning: {path} is damaged ({error}); trying the one before it", file=sys.stderr)
            continue
        return tensors, metadata
    return None


def others(folder: Path, identity: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each other run with checkpoints: how its settings differ, how to resume it, how to delete it."""
    for other in sorted({path.parent for path in folder.parent.glob("*/step-*.safetensors")} - {folder}):
        try:
            theirs = load_metadata(_newest_first(other)[0])["identity"]
        except DAMAGED:
            yield f"{other} has a damaged checkpoint of another run; delete the folder"
            continue
        differences = [text for key in sorted({*identity, *theirs}) for text in _differences(key, theirs, identity)]
        told = ", ".join(differences[:TOLD]) + ", ..." * (len(differences) > TOLD) or "other code"
        yield f"{other} has checkpoints of another run ({told}); set that back to resume it, or delete the folder"


def _differences(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """Yield `section.name=value`, with the other run's value, for each setting that differs here."""
    was, now = theirs.get(key), ours.get(key)
    if isinstance(was, dict) and isinstance(now, dict):
        for name in sorted({*was, *now}):
            yield from (f"{key}.{text}" for text in _differences(name, was, now))
    elif json.dumps(was, default=str) != json.dumps(now, default=str):
        yield f"other {key}" if key in ("data", "code") else f"{key}={json.dumps(was)}"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def _free(folder: Path) -> int:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free
