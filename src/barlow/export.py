"""`barlow export`: write the encoder as ONNX, and only if it agrees with torch.

Reads models/encoder.safetensors, models/head.safetensors and images of data/shards (the val split's first).
Writes models/encoder.onnx; if the new file disagrees with torch, the old one stays. Writes
models/reduced/{int8,fp16}.onnx, each only if it is good enough. Writes models/triton, a model repository of Triton,
and reports/export.json.
"""

from __future__ import annotations

from barlow.core import files
from barlow.core.weights import load_weights
from barlow.encoder import triton
from barlow.evaluation import figures, onnx_file, reduced
from barlow.evaluation.figures import Exporting
from barlow.evaluation.onnx_file import Exported
from barlow.settings.params import Params
from barlow.training import model


def run(params: Params) -> None:
    """Export, compare, and only then put the file in its place.

    Raises:
        UserError: the weights or the shards are missing.
        RuntimeError: onnxruntime does not give what torch gives; the message has the figures.
    """
    for path, stage in ((files.ENCODER, "pretrain"), (files.HEAD, "evaluate")):
        files.require(path, stage)
    encoder, trained = model.load_encoder(files.ENCODER)
    head, head_metadata = load_weights(files.HEAD)
    network = Exported(encoder, head).eval()
    recipe = [trained[section] for section in ("model", "views", "pretrain")]
    metadata = onnx_file.metadata("encoder", encoder, head_metadata["classes"], trained["data"], recipe)
    exported, parity, speed = onnx_file.replace(files.ONNX, network, metadata, params.export)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    triton.write(files.ONNX, files.TRITON)
    precision = reduced.reduce(exported, files.ONNX, files.REDUCED, params.export, params.evaluate)
    figures.write(files.EXPORTING, Exporting(parity, speed, precision, exported.dim, parameters))
