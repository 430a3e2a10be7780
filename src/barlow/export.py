"""`barlow export`: write the encoder as ONNX, and only if it agrees with torch.

Reads models/encoder.safetensors, models/head.safetensors and images of data/shards (the val split's first).
Writes models/encoder.onnx; if the new file disagrees with torch, the old one stays. Writes
models/reduced/{int8,fp16}.onnx, each only if it is accurate enough. Writes models/triton, a model repository of Triton,
and reports/export.json.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from barlow.core import files
from barlow.core.weights import load_weights
from barlow.encoder import quantize, triton
from barlow.encoder.encoder import Encoder
from barlow.evaluation import figures, onnx_file
from barlow.evaluation.exported import accuracy
from barlow.evaluation.figures import Exporting, Precision, Top1
from barlow.evaluation.onnx_file import Exported
from barlow.settings.params import Evaluate, Export, Params
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
    parity, speed = onnx_file.replace(files.ONNX, network, metadata, params.export)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    triton.write(files.ONNX, files.TRITON)
    precision = reduce(files.ONNX, files.REDUCED, params.export, params.evaluate)
    figures.write(files.EXPORTING, Exporting(parity, speed, precision, encoder.backbone.dim, parameters))


def reduce(source: Path, folder: Path, p: Export, evaluate: Evaluate) -> dict[str, Precision]:
    """Write `folder`/int8.onnx and fp16.onnx, each unless it is less accurate than `source`; return all three.

    Without labels no accuracy can be measured, and neither is written. If a file fails now, its old version is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    full = accuracy(Encoder(source), evaluate)
    precisions = {"float32": Precision(full and _rounded(full), source.stat().st_size, True)}
    for name, make in {"int8": quantize.int8, "fp16": quantize.fp16}.items():
        target, reason = folder / f"{name}.onnx", "there are no labels to measure its accuracy with"
        precisions[name] = Precision(None, None, False)
        if full:
            with tempfile.TemporaryDirectory() as temporary:
                made = Path(temporary) / target.name
                make(source, made, p.calibration_images)
                top1 = accuracy(Encoder(made), evaluate)
                assert top1
                lost = max(full.linear - top1.linear, full.knn - top1.knn)
                reason = f"it loses {lost:.2f} points, export.max_accuracy_loss={p.max_accuracy_loss:g}"
                fine = lost <= p.max_accuracy_loss
                precisions[name] = Precision(_rounded(top1), made.stat().st_size, fine)
                if fine:
                    with files.replacing(target) as whole:
                        shutil.copyfile(made, whole)
                    print(f"{target}: linear probe {top1.linear:.1f} %, kNN {top1.knn:.1f} %", flush=True)
        if not precisions[name].written:
            target.unlink(missing_ok=True)
            print(f"{target} is not written: {reason}")
    return precisions


def _rounded(top1: Top1) -> Top1:
    return Top1(round(top1.linear, 6), round(top1.knn, 6))
