"""Encoders of lower precision, made from the exported one: int8 for processors, fp16 for GPUs.

Input, preprocessing and outputs stay as they are. The embeddings differ a little, so they are spaces of their own.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from barlow.core import files, images, webdataset
from barlow.encoder.encoder import Encoder, Pixels
from barlow.evaluation import probe
from barlow.settings.params import Evaluate, Export

GATE_IMAGES = 10_000  # of train and of test that the accuracies are measured on, at most


def reduce(source: Path, folder: Path, p: Export, evaluate: Evaluate) -> dict[str, Any]:
    """Write `folder`/int8.onnx and fp16.onnx, each unless it is less accurate than `source`; return the figures.

    Without labels nothing can be measured, and neither is written. A file of before that fails now is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    full = accuracy(Encoder(source), evaluate)
    figures: dict[str, Any] = (
        {f"float32_{name}": round(value, 6) for name, value in full._asdict().items()} if full else {}
    )
    for name, make in {"int8": int8, "fp16": fp16}.items():
        target, reason = folder / f"{name}.onnx", "there are no labels to measure its accuracy with"
        if full:
            with tempfile.TemporaryDirectory() as temporary:
                made = Path(temporary) / target.name
                make(source, made, p.calibration_images)
                found = accuracy(Encoder(made), evaluate)
                assert found
                figures |= {f"{name}_{key}": round(value, 6) for key, value in found._asdict().items()}
                figures[f"{name}_bytes"] = made.stat().st_size
                lost = max(full.linear_top1 - found.linear_top1, full.knn_top1 - found.knn_top1)
                reason = f"it loses {lost:.2f} points, export.max_accuracy_loss={p.max_accuracy_loss:g}"
                if lost <= p.max_accuracy_loss:
                    with files.replacing(target) as whole:
                        shutil.copyfile(made, whole)
        figures[f"{name}_written"] = full is not None and lost <= p.max_accuracy_loss
        if not figures[f"{name}_written"]:
            target.unlink(missing_ok=True)
            print(f"{target} is not written: {reason}")
    return figures


def int8(source: Path, target: Path, calibration_images: int) -> None:
    """Quantise the convolutions: uint8 activations, int8 weights a channel, in QDQ form.

    The ranges are the smallest and largest values that held-out images bring about (Jacob et al., arXiv 1712.05877).
    """
    held_out = webdataset.read(tar for split in ("val", "train", "pretrain") for tar in webdataset.tars(split))
    pictures = (images.decode(sample.data) for sample in itertools.islice(held_out, calibration_images))
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Warnings, all from onnxruntime's own loggers, ask for the preparation that this is.
        logging.disable(logging.WARNING)
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(prepared),
                str(target),
                _Calibration(pictures),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=["Conv", "Add", "Relu", "MaxPool"],
                per_channel=True,
            )
        finally:
            logging.disable(logging.NOTSET)
    _label(onnx.load(target), "int8", target)


def fp16(source: Path, target: Path, _: int) -> None:
    """Convert weights and activations to 16-bit floats, except where sums of 8-bit values need the range."""
    proto = onnx.load(source)
    operators = [node.op_type for node in proto.graph.node]
    preprocessing = [node.name for node in proto.graph.node[: operators.index("Conv")]]
    converted = OnnxModel(convert_float_to_float16(proto, keep_io_types=True, node_block_list=preprocessing))
    converted.topological_sort()  # the conversion adds its casts at the end
    _label(converted.model, "fp16", target)


class Accuracy(NamedTuple):
    """Top-1 in percent of the test images; what is served is what is measured."""

    linear_top1: float  # by the file's own logits
    knn_top1: float


def accuracy(encoder: Encoder, p: Evaluate) -> Accuracy | None:
    """Measure as `barlow evaluate` does, kNN from train to test; None where one of them has no labels."""
    (train, train_labels, _), (test, labels, logits) = (_embed(encoder, split) for split in ("train", "test"))
    if not len(train) or not len(test) or encoder.classes is None:
        return None
    votes = probe.knn(test, train, train_labels, len(encoder.classes), p.knn_k, p.knn_temperature)
    return Accuracy(probe.accuracy(logits.argmax(1), labels), probe.accuracy(votes.argmax(1), labels))


def _embed(encoder: Encoder, split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return embeddings, labels and logits of the first labelled images of a split."""
    labels: list[int] = []

    def decoded() -> Iterator[Pixels]:
        labelled = (sample for sample in webdataset.read(webdataset.tars(split)) if sample.label >= 0)
        for sample in itertools.islice(labelled, GATE_IMAGES):
            labels.append(sample.label)
            yield images.decode(sample.data)

    parts = list(encoder.run(decoded()))
    vectors = [np.empty((0, encoder.dim), np.float32), *(embeddings for embeddings, _ in parts)]
    logits = [
        np.empty((0, len(encoder.classes or [])), np.float32),
        *(found for _, found in parts if found is not None),
    ]
    return torch.from_numpy(np.concatenate(vectors)), torch.tensor(labels), torch.from_numpy(np.concatenate(logits))


class _Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
    """One image a run, since sizes differ."""

    def __init__(self, pictures: Iterator[Pixels]) -> None:
        self._pictures = pictures

    def get_next(self) -> dict[str, Any] | None:
        picture = next(self._pictures, None)
        return None if picture is None else {"images": picture[None]}


def _label(proto: onnx.ModelProto, precision: str, path: Path) -> None:
    """Write the model with its precision in its metadata and its embedding space."""
    metadata = {entry.key: entry.value for entry in proto.metadata_props if not entry.key.startswith("onnx.")}
    onnx.helper.set_model_props(proto, metadata | {"precision": precision, "space": f"{metadata['space']}-{precision}"})
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))
