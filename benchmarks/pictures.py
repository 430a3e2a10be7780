"""What the benchmarks look at: JPEG files of a folder, or drawn ones of the size of CIFAR's or of ImageNet's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from barlow.core import webdataset
from barlow.shard import shrunk


def files(folder: Path, n: int, height: int, width: int) -> list[Path]:
    """Draw `n` JPEG files into a folder: smooth shapes with fine texture, quality 90 (500 x 375 takes about 75 kB)."""
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = np.zeros((height, width, 3))
        for cells, strength in ((4, 90), (16, 40), (64, 20)):
            coarse = rng.normal(0, strength, (cells, cells, 3)) + rng.normal(0, strength, (cells, cells, 1))
            layers = [Image.fromarray(coarse[:, :, c].astype(np.float32)) for c in range(3)]
            resized = [np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC)) for layer in layers]
            pixels += np.stack(resized, -1)
        pixels += 128 + rng.normal(0, 8, (height, width, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)
    return sorted(folder.glob("*.jpg"))


def shard(paths: list[Path], tar: Path, max_side: int | None = None) -> list[Path]:
    """Pack files into one tar, shrunk as the stage `shard` does it."""

    def sample(i: int, path: Path) -> webdataset.Sample:
        data = path.read_bytes()
        width, height = Image.open(path).size
        if max_side is not None and max(width, height) > max_side:
            data, (width, height) = shrunk(data, max_side)
        return webdataset.Sample(f"{i:024x}", data, "jpg", -1, height, width)

    webdataset.write(tar, (sample(i, path) for i, path in enumerate(paths)))
    return [tar]
