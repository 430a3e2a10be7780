"""`python benchmarks/neighbours.py`: accuracy lost and neighbours kept by int8, fp16 and ever coarser weights.

Measures models/encoder.safetensors on data/shards, which needs labels; so run `make repro` before. The bound
`export.min_neighbours` comes from this table.
"""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from barlow.core import files, provenance
from barlow.encoder import quantize
from barlow.encoder.encoder import Encoder
from barlow.evaluation import exported, neighbours, onnx_file, probe
from barlow.evaluation.features import labelled
from barlow.settings import loading
from barlow.training import model

KS = (5, 10, 20, 50)


def coarse(bits):
    """Return what rounds the weights of each filter to so many bits, as `quantize.int8` takes its arguments."""

    def make(source, target, _):
        proto = onnx.load(source)
        filters = {node.input[1] for node in proto.graph.node if node.op_type == "Conv"}
        for tensor in proto.graph.initializer:
            if tensor.name in filters:
                values = numpy_helper.to_array(tensor)
                step = np.abs(values).max((1, 2, 3), keepdims=True) / (2 ** (bits - 1) - 1)
                rounded = np.round(values / np.where(step > 0, step, 1)) * step
                tensor.CopyFrom(numpy_helper.from_array(rounded.astype(np.float32), tensor.name))
        onnx.save(proto, target)

    return make


MAKES = {"int8": quantize.int8, "fp16": quantize.fp16} | {f"{n}-bit weights": coarse(n) for n in (8, 7, 6, 5, 4, 3)}


def embedded(path):
    """Return an encoder's features of the labelled splits, and of the images whose neighbours are compared."""
    encoder = Encoder(path)
    splits = {
        split: exported.embed(encoder, islice(labelled(split), exported.ACCURACY_IMAGES))
        for split in ("train", "val", "test")
    }
    return splits, exported.compared(encoder)


def main() -> None:
    settings = loading.load()
    p, classes = settings.evaluate, len(files.read_json(files.SHARDS / "classes.json"))
    network = onnx_file.Exported(model.load_encoder(files.ENCODER)[0], {}).eval()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float32.onnx", Path(folder) / "reduced.onnx"
        onnx_file.write(network, {"space": "benchmark", "classes": "[]"}, settings.export.opset, source)
        splits, full = embedded(source)
        weight, bias, _ = probe.choose_linear(splits["train"][:2], splits["val"][:2], classes, p.probe_l2)

        def accuracies(splits):
            train, test = splits["train"], splits["test"]
            scores = probe.knn(test.features, *train[:2], classes, p.knn_k, p.knn_temperature)
            logits = test.features @ weight.T + bias
            return np.array([probe.accuracy(each.argmax(1), test.labels) for each in (logits, scores)])

        base, images = accuracies(splits), len(splits["test"].keys)
        print(f"{provenance.hardware()}; float32: linear probe {base[0]:.1f}, kNN {base[1]:.1f}; {images} test images")
        print(f"| | linear probe | kNN |{''.join(f' kept, k={k} |' for k in KS)}\n|---|---|---|{'---|' * len(KS)}")
        for name, make in MAKES.items():
            make(source, target, settings.export.calibration_images)
            splits, reduced = embedded(target)
            linear, knn = accuracies(splits) - base
            kept = "".join(f" {neighbours.kept(full, reduced, k):.1f} |" for k in KS)
            print(f"| {name} | {linear:+.1f} | {knn:+.1f} |{kept}", flush=True)


if __name__ == "__main__":
    main()
