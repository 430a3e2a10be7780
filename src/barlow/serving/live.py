"""The served model, and its replacement by a new one while requests go on."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from barlow.core import bands
from barlow.core.errors import UserError
from barlow.encoder.encoder import Encoder
from barlow.encoder.registry import Version
from barlow.encoder.search import Index
from barlow.serving.engine import Engine
from barlow.serving.metrics import Metrics
from barlow.settings.flags import Flags

POLL_SECONDS = 1.0
logger = logging.getLogger("uvicorn.error")
Seen = tuple[str, int, int, int]


class Served:
    """A model that passed its checks, with its engine and, if there is one for its embedding space, an index."""

    def __init__(self, path: Path, folder: Path, flags: Flags, metrics: Metrics) -> None:
        """Load, check and warm up.

        Raises:
            UserError: the file is damaged, or the model fails a check; the message says which.
        """
        real = Path(os.path.realpath(path))  # unlike resolve(), it raises no error for links in a circle
        version = Version(real.parent)
        self.name = real.name
        if (real.parent / "card.json").exists():  # the file is in a registry
            self.name = version.name
            if damage := version.damage():
                raise UserError(f"{path}: {damage}")
            path = real  # the checked file: the link may point elsewhere by now
        self.encoder = encoder = Encoder(path, flags.threads)
        _check(encoder, path)
        self.space = encoder.metadata["space"]
        self.index: Index | None = None
        self._index_path = folder / f"{self.space}.npz"
        self._index_seen: Seen | None = None
        self.engine = Engine(encoder, flags, metrics)

    def look_for_index(self) -> bool:
        """Read the index if its file changed, and return whether it did. A bad index is logged and not used."""
        seen = signature(self._index_path)
        if seen == self._index_seen:
            return False
        self._index_seen = seen
        try:
            self.index = Index(self._index_path, self.space) if seen else None
        except Exception as error:  # a bad index must not stop the model
            logger.warning("no search: %s", error)
            self.index = None
        return True


class Live:
    """Watches the model file, which may be a link (a registry's production/encoder.onnx), and its index."""

    def __init__(self, path: Path, index: Path, flags: Flags, metrics: Metrics) -> None:
        """Load the model; raises UserError where it cannot be used."""
        self._path, self._folder, self._flags, self._metrics = path, index, flags, metrics
        self._seen = signature(path)
        self.current = Served(path, index, flags, metrics)
        self.current.look_for_index()
        self._set_gauges()

    async def watch(self) -> None:
        """Look for changes every POLL_SECONDS; never returns."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.look()
            except Exception:  # otherwise the service would never again see a new model
                logger.exception("looking for a new model failed")

    async def look(self) -> None:
        """If the file changed, load and check the new model, then replace the old one; a bad one is refused."""
        seen = await asyncio.to_thread(signature, self._path)
        if seen != self._seen:
            self._seen = seen
            try:
                new = await asyncio.to_thread(Served, self._path, self._folder, self._flags, self._metrics)
                await asyncio.to_thread(new.look_for_index)
            except Exception as error:
                self._metrics.reloads.labels("refused").inc()
                logger.error("%s is refused, and %s goes on: %s", self._path, self.current.name, error)
                return
            old, self.current = self.current, new
            self._set_gauges()
            self._metrics.reloads.labels("done").inc()
            logger.info("%s (space %s) replaces %s", new.name, new.space, old.name)
            await old.engine.close()
            del old
            await asyncio.to_thread(_free)
        elif await asyncio.to_thread(self.current.look_for_index):
            self._set_gauges()
            logger.info("index: %d images", len(self.current.index or ()))

    async def close(self) -> None:
        """Answer the submitted requests, and end."""
        await self.current.engine.close()

    def _set_gauges(self) -> None:
        self._metrics.model.clear()
        self._metrics.model.labels(self.current.name, self.current.space).set(1)
        self._metrics.index.set(len(self.current.index or ()))


def signature(path: Path) -> Seen | None:
    """Return real path, inode, size and time of a file, which differ for another file; None if there is no file."""
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return None
    return str(real), status.st_ino, status.st_size, status.st_mtime_ns


def _check(encoder: Encoder, path: Path) -> None:
    """Check that outputs are finite and the same alone and in a batch; the run also allocates memory in advance."""
    text = encoder.metadata.get("image_size", "32")
    side = int(text) if text.isdigit() else 32
    pictures = bands.noise(3, side, encoder.form)
    try:
        together, alone = encoder.embed(pictures), encoder.embed(pictures, batch_size=1)
        logits = encoder.classify(pictures)
    except Exception as error:
        raise UserError(f"{path} cannot be run ({' '.join(str(error).split())[:200]})") from None
    if not np.isfinite(together).all() or (logits is not None and not np.isfinite(logits).all()):
        raise UserError(f"{path} gives NaN or infinity")
    if together.shape != (3, encoder.dim) or not np.allclose(together, alone, rtol=1e-3, atol=1e-3):
        raise UserError(f"{path} gives an image another embedding in a batch than alone")
    if encoder.classes is not None and len(encoder.classes) != (logits.shape[1] if logits is not None else 0):
        raise UserError(f"{path} has other logits than classes {json.dumps(encoder.classes)}")


def _free() -> None:
    """Return the memory of a removed model to the system; the C library would keep it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
