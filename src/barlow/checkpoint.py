"""Resume state: one safetensors file a checkpoint, whole or absent, the last two kept, nothing unpickled."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from barlow import model
from barlow.errors import UserError

FOLDER = Path("models/resume")
KEPT = 2
DAMAGED = (SafetensorError, OSError, KeyError, TypeError, ValueError)  # what reading may raise


def fingerprint(**parts: Any) -> str:
    """Hash what a run must have in common with the one it resumes, this package's code included."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def save(folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write the checkpoint of `step`, then delete all but the last two of this run; those of others stay.

    Raises:
        UserError: it cannot be written; names the path and the bytes needed. Those before it stay.
    """
    path = folder / f"step-{step:09d}.safetensors"
    try:
        model.save_weights(path, tensors, metadata | {"step": step})
    except OSError as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise UserError(
            f"{path} cannot be written ({error.strerror}): it needs {needed:,} bytes and {_free(folder):,} are free; "
            f"make room and run again, to go on from {newest(folder, metadata['fingerprint']) or 'the start'}"
        ) from None
    for old in [*_of_run(folder, metadata["fingerprint"])[KEPT:], *_parts(folder)]:
        old.unlink()


class Writer:
    """Writes checkpoints in a thread, one at a time, while training goes on."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Copy the tensors where they are and return; the rest is the thread's. Raises what the last one raised."""
        self.wait()
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        ready = torch.cuda.current_stream().record_event() if next(iter(copies.values())).is_cuda else None
        self._last = self._thread.submit(self._write, step, copies, metadata, ready)

    def _write(self, step: int, copies: dict[str, Tensor], metadata: dict[str, Any], ready: Any) -> None:
        """On a GPU the copies leave it in a stream of their own, beside the training's."""
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

    def newest(self, fingerprint: str) -> Path | None:
        """Return the path of the run's newest checkpoint, if there is one."""
        return newest(self._folder, fingerprint)


def newest(folder: Path, fingerprint: str) -> Path | None:
    """Return the path of a run's newest checkpoint, if there is one."""
    return next(iter(_of_run(folder, fingerprint)), None)


def latest(folder: Path, expected: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return (tensors, metadata) of the newest whole checkpoint with the `expected` fingerprint.

    One that is damaged or of another run is skipped with a warning; None means a fresh start.
    """
    for path in _newest_first(folder):
        try:
            tensors, metadata = model.load_weights(path)
        except DAMAGED as error:
            print(f"warning: {path} is damaged ({error}); trying the one before it", file=sys.stderr)
            continue
        if metadata.get("fingerprint") == expected:
            return tensors, metadata
        print(
            f"warning: {path} is of a run with other params, data or code; not resumed, and kept: go back to those to "
            "go on with that run, or delete the file",
            file=sys.stderr,
        )
    return None


def clear(folder: Path, fingerprint: str) -> None:
    """Delete the checkpoints of a run, and what killed writers left; those of other runs stay."""
    for path in [*_of_run(folder, fingerprint), *_parts(folder)]:
        path.unlink()


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def _of_run(folder: Path, fingerprint: str) -> list[Path]:
    return [path for path in _newest_first(folder) if _fingerprint(path) == fingerprint]


def _fingerprint(path: Path) -> str | None:
    """Return the fingerprint in a checkpoint's header, None where that is damaged."""
    try:
        found: str | None = model.load_metadata(path).get("fingerprint")
    except DAMAGED:
        return None
    return found


def _parts(folder: Path) -> list[Path]:
    """Return what a process that was killed while it wrote has left."""
    return list(folder.glob(".step-*.tmp"))


def _free(folder: Path) -> int:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free
