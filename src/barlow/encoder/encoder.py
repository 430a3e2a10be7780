"""The exported encoder in onnxruntime: images of any kind and size to embeddings, without torch."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime
from PIL import Image

from barlow.core import files
from barlow.core.bands import PixelFormat, Pixels, decode, of_image
from barlow.core.errors import UserError

Vectors = np.ndarray[Any, np.dtype[np.float32]]  # (n, dim) or (n, classes)
Float = TypeVar("Float", np.float32, np.float64)

MAX_PIXELS = 100_000_000  # per image file that is decoded here
LARGE = 2_000_000  # pixels per batch above which onnxruntime frees its memory afterwards; else it never does
BATCH_PIXELS = 16_000_000  # per batch: the resize inside the network holds them as float32, 200 MB


class Encoder:
    """An exported encoder.

    Attributes:
        dim: length of an embedding.
        classes: names of the classes; None if no head was fitted.
        kind: "encoder", or "classifier" if the whole network was trained on labels.
        form: channels and bits of the images that it takes.
        metadata: what `barlow export` wrote into the file: version, hashes, image size, embedding space.
    """

    def __init__(self, path: Path | str = files.ONNX, threads: int | None = None) -> None:
        """Load a file of `barlow export`, by default with one thread per processor that this process may use.

        Raises:
            UserError: the file is missing or damaged, or `barlow export` did not write it.
        """
        command = "finetune --all-labels" if Path(path) == files.CLASSIFIER else "export"
        files.require(path, command, ", or name another file with --model")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or files.cpus()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it takes time from other processes
        options.enable_mem_pattern = False  # each new input shape would add a pattern that is never freed
        options.log_severity_level = 3
        known = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in known]
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is not a whole ONNX file ({reason}); run `barlow export` again") from None
        inputs = [(value.name, value.type, len(value.shape)) for value in self._session.get_inputs()]
        outputs = {value.name: value.shape[-1] for value in self._session.get_outputs()}
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        channels, bits = self.metadata.get("channels", "3"), self.metadata.get("bits", "8")
        written = "embedding" in outputs and "space" in self.metadata and channels.isdigit()
        if inputs != [("images", f"tensor(uint{bits})", 4)] or not written:
            raise UserError(f"{path} was not written by `barlow export` (inputs {inputs}, outputs {[*outputs]})")
        self.form = PixelFormat(int(channels), int(bits))
        self.dim: int = outputs["embedding"]
        self.kind = self.metadata.get("kind", "encoder")
        self._large = onnxruntime.RunOptions()
        self._large.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.classes: list[str] | None = json.loads(self.metadata["classes"]) if "logits" in outputs else None

    def embed(self, images: Iterable[Any], batch_size: int = 64) -> Vectors:
        """Return the embeddings (n, dim) of arrays (height, width, channels), PIL images or paths.

        Arrays are uint8, or uint16 if `form` says so. With 1 or 3 channels they may be (height, width), which is grey.

        Raises:
            ValueError: an image is something else, or a file cannot be decoded.
        """
        parts = [embeddings for embeddings, _ in self.run(images, batch_size)]
        return np.concatenate([np.empty((0, self.dim), np.float32), *parts])

    def classify(self, images: Iterable[Any], batch_size: int = 64) -> Vectors | None:
        """Return the logits (n, classes), or None if no head was fitted; raises as `embed` does."""
        if self.classes is None:
            return None
        parts = [logits for _, logits in self.run(images, batch_size) if logits is not None]
        return np.concatenate([np.empty((0, len(self.classes)), np.float32), *parts])

    def run(self, images: Iterable[Any], batch_size: int = 64) -> Iterator[tuple[Vectors, Vectors | None]]:
        """Yield (embeddings, logits) per batch, in order; one batch of images is in memory at a time."""
        for batch in batches(map(self._pixels, self._several(images)), batch_size):
            by_shape = defaultdict(list)
            for row, image in enumerate(batch):
                by_shape[image.shape].append(row)
            embeddings = np.empty((len(batch), self.dim), np.float32)
            logits = np.empty((len(batch), len(self.classes)), np.float32) if self.classes is not None else None
            outputs = {"embedding": embeddings} if logits is None else {"embedding": embeddings, "logits": logits}
            for rows in by_shape.values():
                stacked = np.stack([batch[row] for row in rows])
                options = self._large if stacked.size > 3 * LARGE else None
                results = self._session.run([*outputs], {"images": stacked}, options)
                for output, values in zip(outputs.values(), results, strict=True):
                    output[rows] = values
            yield embeddings, logits

    def _several(self, images: Any) -> Iterable[Any]:
        """Raise ValueError for a single image: its rows, or the letters of a path, would be taken for images."""
        one = isinstance(images, (str, os.PathLike, Image.Image))
        if one or (isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[2] == self.form.channels):
            raise ValueError("one image where several are expected; write [image]")
        return images  # type: ignore[no-any-return]

    def _pixels(self, image: Any) -> Pixels:
        """Return one image as `form` says: (height, width, channels)."""
        if isinstance(image, (str, os.PathLike)):
            try:
                return decode(Path(image).read_bytes(), self.form, MAX_PIXELS)
            except ValueError as error:
                raise ValueError(f"{image}: {error}") from None
        if isinstance(image, Image.Image):
            return of_image(image, self.form)
        channels, dtype = self.form.channels, self.form.dtype
        if isinstance(image, np.ndarray) and image.dtype == dtype and image.size > 0:
            if image.ndim == 2 and channels in (1, 3):
                return np.repeat(image[:, :, None], channels, axis=2)
            if image.ndim == 3 and image.shape[2] == channels:
                return image
        got = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        grey = " or (height, width)" if channels in (1, 3) else ""
        text = f"a {dtype} array (height, width, {channels}){grey}, a PIL image or a path"
        raise ValueError(f"an image must be {text}; got {got}")


def batches(pixels: Iterable[Pixels], size: int) -> Iterator[list[Pixels]]:
    """Yield lists of at most `size` images and BATCH_PIXELS pixels; a larger image is a list of its own."""
    batch: list[Pixels] = []
    for image in pixels:
        if batch and (len(batch) >= size or sum(held.size for held in batch) + image.size > 3 * BATCH_PIXELS):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


def unit(rows: np.ndarray[Any, np.dtype[Float]]) -> np.ndarray[Any, np.dtype[Float]]:
    """Return the rows (n, dim) scaled to length 1, in their own precision; a row of zeros stays one."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(rows.dtype, copy=False)


def softmax(logits: Vectors) -> Vectors:
    """Return the probabilities over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def top1(logits: Vectors, classes: Sequence[str]) -> tuple[list[str], Vectors]:
    """Return the most probable class of each row and its softmax probability."""
    return [classes[index] for index in logits.argmax(axis=1)], softmax(logits).max(axis=1)
