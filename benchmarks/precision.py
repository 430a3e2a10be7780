"""`python benchmarks/precision.py`: int8 and fp16 against float32 in onnxruntime, and torch beside them.

Measures models/encoder.onnx and, with random weights, the network of the CIFAR-10 preset at 32 px and a ResNet-18 at
224 px. int8 is calibrated on data/shards; so run `make repro` before. Throughput of batches, each from uint8 pixels.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # torch's threads would spin on, and slow down what is measured next
import torch
from rounds import seconds

from barlow.core import files, provenance
from barlow.encoder import quantize
from barlow.encoder.encoder import Encoder
from barlow.evaluation import onnx_file
from barlow.settings import loading
from barlow.training import model

ROUNDS = 7
BATCHES = (1, 16, 64)


def networks(settings):
    """Yield names with the exported network; random weights are as fast as others."""
    trained = onnx_file.Exported(model.load_encoder(files.ENCODER)[0], {}).eval()
    yield f"models/encoder.onnx, {trained.encoder.size} px", trained
    for stem, size in (("small", 32), ("imagenet", 224)):
        shape = dataclasses.replace(settings.model, arch="resnet18", stem=stem)
        encoder = model.FrozenEncoder(shape, dataclasses.replace(settings.views, size=size))
        yield f"resnet18, stem {stem}, {size} px", onnx_file.Exported(encoder, {}).eval()


def variants(network, settings, folder):
    """Return functions of a batch of pixels, by name: torch, and onnxruntime at three precisions."""
    paths = {name: Path(folder) / f"{name}.onnx" for name in ("float32", "int8", "fp16")}
    onnx_file.write(network, {"space": "benchmark", "classes": "[]"}, settings.export.opset, paths["float32"])
    quantize.int8(paths["float32"], paths["int8"], 64)
    quantize.fp16(paths["float32"], paths["fp16"], 0)
    encoders = {name: Encoder(path) for name, path in paths.items()}

    def in_torch(pixels):
        with torch.inference_mode():
            network(torch.from_numpy(pixels))

    calls = {
        name: lambda pixels, encoder=encoder: encoder.embed(pixels, len(pixels)) for name, encoder in encoders.items()
    }
    return {"torch": in_torch, **calls}


def measure(calls, pixels, repeat):
    """Return seconds an image of each call, a list of rounds, taken in turn."""
    times = {key: [] for key in calls}
    for round_ in range(ROUNDS + 1):
        for key, call in calls.items():
            taken = seconds(lambda call=call: [call(pixels) for _ in range(repeat)])
            times[key] += [taken / repeat / len(pixels)] * (round_ > 0)
    return times


def main() -> None:
    print(provenance.hardware())
    settings = loading.load()
    torch.set_num_threads(files.cpus())
    for name, network in networks(settings):
        side = network.encoder.size
        with tempfile.TemporaryDirectory() as folder:
            calls = variants(network, settings, folder)
            for batch in BATCHES:
                pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
                times = measure(calls, pixels, max(256 // batch // (1 if side < 100 else 32), 1))
                text = ", ".join(f"{key} {1 / statistics.median(values):.0f}" for key, values in times.items())
                ratios = [full / low for full, low in zip(times["float32"], times["int8"], strict=True)]
                gain = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n={ROUNDS})"
                print(f"{name}, batch {batch}: images/s: {text}; int8 over float32 {gain}", flush=True)


if __name__ == "__main__":
    main()
