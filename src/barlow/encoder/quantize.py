"""Encoders of lower precision, made from the exported one: int8 for processors, fp16 for GPUs.

Input, preprocessing and outputs stay the same. The embeddings differ a little, so each precision is a space of its own.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from barlow.core import bands, webdataset
from barlow.core.bands import Pixels

LINEAR = ("Conv", "MatMul", "Gemm")  # operators with weights


def int8(source: Path, target: Path, calibration_images: int) -> None:
    """Quantise convolutions and products of matrices: uint8 activations, int8 weights per channel, in QDQ form.

    The whitening and the head, which gives the logits, stay as they are. Ranges are the smallest and largest
    activations on `calibration_images` images, held-out ones first (Jacob et al., arXiv 1712.05877).
    """
    samples = webdataset.read(tar for split in ("val", "train", "pretrain") for tar in webdataset.tars(split))
    pictures = (bands.unpack(sample.data) for sample in itertools.islice(samples, calibration_images))
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # onnxruntime warns that the model should be prepared, although quant_pre_process does just that.
        logging.disable(logging.WARNING)
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            nodes = onnx.load(prepared).graph.node
            after = [n.name for n in nodes if "logits" in n.output or any("whitening" in name for name in n.input)]
            matrices = any(node.op_type in ("MatMul", "Gemm") and node.name not in after for node in nodes)
            # Sums between convolutions are cheaper in int8. A transformer's need more than 256 levels, since a few of
            # its channels have far larger values than the others.
            sums = [] if matrices else ["Add"]
            quantization.quantize_static(
                str(prepared),
                str(target),
                _Calibration(pictures),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=[*LINEAR, "Relu", "MaxPool", *sums],
                nodes_to_exclude=after,
                per_channel=True,
                # 7-bit weights: the sums of 8-bit ones overflow on processors without VNNI, and err ten times as much.
                reduce_range=matrices,
            )
        finally:
            logging.disable(logging.NOTSET)
    _label(onnx.load(target), "int8", target)


def fp16(source: Path, target: Path, _: int) -> None:
    """Convert weights and activations to 16-bit floats, except where sums of 8-bit values need the range."""
    proto = onnx.load(source)
    operators = [node.op_type for node in proto.graph.node]
    first = min(operators.index(name) for name in LINEAR if name in operators)  # of the network itself
    preprocessing = [node.name for node in proto.graph.node[:first]]
    converted = OnnxModel(convert_float_to_float16(proto, keep_io_types=True, node_block_list=preprocessing))
    converted.topological_sort()  # the conversion adds its casts at the end
    _label(converted.model, "fp16", target)


class _Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
    """One image per run, since sizes differ."""

    def __init__(self, pictures: Iterator[Pixels]) -> None:
        self._pictures = pictures

    def get_next(self) -> dict[str, Any] | None:
        picture = next(self._pictures, None)
        return None if picture is None else {"images": picture[None]}


def _label(proto: onnx.ModelProto, precision: str, path: Path) -> None:
    """Write the model with its precision in its metadata and in the id of its embedding space."""
    metadata = {entry.key: entry.value for entry in proto.metadata_props if not entry.key.startswith("onnx.")}
    onnx.helper.set_model_props(proto, metadata | {"precision": precision, "space": f"{metadata['space']}-{precision}"})
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))
