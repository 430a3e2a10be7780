"""The facts of an image file: the columns of the manifest that need the file read and decoded."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import stat
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from barlow.core import bands, files, images
from barlow.core.bands import RGB, PixelFormat
from barlow.core.errors import UserError
from barlow.core.progress import Progress
from barlow.data import manifest

FACTS = pa.schema(
    [
        *(field for field in manifest.SCHEMA if field.name not in ("path", "split", "label", "bytes")),
        pa.field("greys", pa.int16()),  # grey values that occur in the image; not in the manifest
    ]
)
CHUNK = 64  # files per task of a process


def read_all(
    root: Path, paths: list[str], max_pixels: int, form: PixelFormat = RGB
) -> Generator[pa.RecordBatch, None, None]:
    """Yield the FACTS of files in order, one batch per chunk; all processors read. Shows progress.

    Raises:
        UserError: a process was killed, most likely for lack of memory.
    """
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    read = partial(read_chunk, root, max_pixels=max_pixels, form=form)
    with Progress("ingest", len(paths)) as progress:
        for chunk, batch in zip(chunks, _map(read, chunks), strict=True):
            progress.update(len(chunk))
            yield batch


def _map(read: Any, chunks: list[list[str]]) -> Generator[pa.RecordBatch, None, None]:
    if len(chunks) <= 1:
        yield from map(read, chunks)
        return
    # Not fork: torch, tqdm or a test runner may have started threads in this process.
    with ProcessPoolExecutor(files.cpus(), get_context("forkserver"), _follow_parent) as pool:
        try:
            yield from pool.map(read, chunks)
        except BrokenProcessPool:
            raise UserError(
                "a process that decodes images was killed, most likely for lack of memory; lower ingest.max_pixels"
            ) from None


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent process, and end when the parent ends, even if it was killed."""

    def follow() -> None:
        parent = parent_process()
        assert parent
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


def read_chunk(root: Path, paths: list[str], max_pixels: int, form: PixelFormat = RGB) -> pa.RecordBatch:
    """Read and decode files; return their FACTS."""
    return pa.RecordBatch.from_pylist([_read_image(root / path, max_pixels, form) for path in paths], FACTS)


def _read_image(path: Path, max_pixels: int, form: PixelFormat = RGB) -> dict[str, Any]:
    """Return the FACTS of one file. Any failure becomes its `error`: short, and without the path."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return {"error": "not a regular file"}
        most = max(2 * form.channels, 8)  # bytes per pixel: 16 bits, and at least RGBA
        if status.st_size > 16_000_000 + most * max_pixels:  # a film is not read into memory
            return {
                "sha256": files.sha256(path),
                "error": f"{status.st_size} bytes, more than ingest.max_pixels can fill",
            }
        content = path.read_bytes()
    except FileNotFoundError:
        return {"error": "no such file, or a name that is not UTF-8"}
    except (OSError, ValueError) as error:
        return {"error": f"cannot be read: {getattr(error, 'strerror', None) or error}"}
    facts: dict[str, Any] = {"sha256": hashlib.sha256(content).hexdigest()}
    if not content:
        return facts | {"error": "empty file"}
    try:
        image = bands.read(content, form, max_pixels, images.INGESTED)
        histogram = _histogram(image.pixels)
    except Exception as error:  # a broken file can make a decoder raise anything
        return facts | {"error": " ".join(str(error).split())[:200] or type(error).__name__}
    n, total, squares = (int((np.arange(len(histogram)) ** power * histogram).sum()) for power in (0, 1, 2))
    scale = 255 / (len(histogram) - 1)
    return facts | {
        "greys": min(np.count_nonzero(histogram), 2**15 - 1),
        "width": image.width,
        "height": image.height,
        "mode": image.mode,
        "format": image.format,
        "pixels": images.digest(image.pixels),
        "brightness": round(scale * total / n, 3),
        "contrast": round(scale * math.sqrt(n * squares - total**2) / n, 3),  # the integers under the root are exact
        "orientation": image.orientation,
    }


def _histogram(pixels: bands.Pixels) -> Any:
    """Return how often each grey value occurs: of RGB as Pillow weighs it, else of the channels' mean."""
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return np.array(Image.fromarray(pixels).convert("L").histogram())
    grey = pixels.mean(axis=2, dtype=np.float32).round().astype(pixels.dtype)
    return np.bincount(grey.ravel(), minlength=np.iinfo(pixels.dtype).max + 1)
