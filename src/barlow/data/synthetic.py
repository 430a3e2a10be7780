"""The embedded default data set, "surfaces": ten material families as an inspection camera might see them.

Only structure tells the families apart. Position, period, a small rotation, the two tones and which of them is the
figure, lighting, tint and noise are drawn from the same distributions for every family, so colour, brightness and order
tell nothing about the label. A few bad files are planted, so that validation has something to reject.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from barlow.core import images
from barlow.core.progress import shown
from barlow.settings import params

Array = np.ndarray[Any, np.dtype[np.float64]]
SUPERSAMPLING = 2  # pixels drawn per pixel kept, along each axis: it makes edges smooth


def bricks(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Running bond: bricks twice as wide as high, every other row shifted by half a brick."""
    row = np.floor(2 * v)
    return np.minimum(_inside(u + row / 2, 0.04), _inside(2 * v, 0.08))


def cells(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Voronoi cells (Worley noise): the border between the two nearest seeds of a jittered grid."""
    nearest = _worley(u, v, rng)
    return _step(nearest[1] - nearest[0], 0.12)


def checker(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Checkerboard."""
    return (np.floor(2 * u) + np.floor(2 * v)) % 2


def chevron(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Zigzag stripes."""
    return _square(2 * v + np.abs(u % 1 - 0.5) * 2)


def dots(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Discs on a square lattice."""
    return _step(0.3 - np.hypot(u % 1 - 0.5, v % 1 - 0.5), 0)


def grain(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Wood: stripes bent by slow noise and broken along their length."""
    phase = rng.uniform(0, 2 * np.pi, 3)
    bend = 0.5 * np.sin(1.1 * u + phase[0]) + 0.3 * np.sin(2.3 * u + 0.8 * v + phase[1])
    return _square(1.6 * v + bend) * _step(np.sin(2.1 * u + 9 * np.floor(1.6 * v + bend) + phase[2]) + 0.6, 0)


def mesh(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Thin diagonal wires that cross."""
    return np.minimum(_inside(u + v, 0.1), _inside(u - v, 0.1))


def rings(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Concentric rings in each cell of a square lattice."""
    return _square(4 * np.hypot(u % 1 - 0.5, v % 1 - 0.5))


def waves(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Smooth wavy stripes."""
    return _square(2 * v + 0.35 * np.sin(2 * np.pi * u))


def weave(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Plain weave: horizontal and vertical threads, over and under in turn."""
    over = (np.floor(2 * u) + np.floor(2 * v)) % 2
    return np.where(over == 1, _inside(2 * v, 0.2), _inside(2 * u, 0.2)) * np.where(over == 1, 1.0, 0.6)


def _inside(x: Array, border: float) -> Array:
    return _step(0.5 - border - np.abs(x % 1 - 0.5), 0)


def _square(x: Array) -> Array:
    return _step(0.25 - np.abs(x % 1 - 0.5), 0)


def _step(x: Array, at: float) -> Array:
    return (x > at).astype(np.float64)


def _worley(u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Return the distances to the nearest and second nearest seed, (2, height, width)."""
    side = int(max(np.ptp(u), np.ptp(v))) + 4
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) - 1.5
    seeds = grid + rng.uniform(-0.4, 0.4, grid.shape) + [np.floor(u.min()), np.floor(v.min())]
    distance = np.hypot(u[..., None] - seeds[:, 0], v[..., None] - seeds[:, 1])
    return np.moveaxis(np.partition(distance, 1, axis=-1)[..., :2], -1, 0)


FAMILIES: dict[str, Callable[[Array, Array, np.random.Generator], Array]] = {
    family.__name__: family for family in (bricks, cells, checker, chevron, dots, grain, mesh, rings, waves, weave)
}


def surface(family: str, size: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Draw one image of a family: uint8 (size, size, 3)."""
    n = size * SUPERSAMPLING
    y, x = np.mgrid[:n, :n] / n - 0.5
    angle, periods = rng.normal(0, 0.2), rng.uniform(2, 4.5)
    u = periods * (x * np.cos(angle) - y * np.sin(angle)) + rng.uniform(0, 10)
    v = periods * (x * np.sin(angle) + y * np.cos(angle)) + rng.uniform(0, 10)
    figure = FAMILIES[family](u, v, rng)
    figure = figure.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3))

    dark = rng.uniform(40, 110)
    light = dark + rng.uniform(50, 110)
    ground, tone = (dark, light) if rng.random() < 0.5 else (light, dark)
    grey = ground + (tone - ground) * figure
    y, x = np.mgrid[:size, :size] / size - 0.5
    towards = rng.uniform(0, 2 * np.pi)
    grey *= 1 + rng.uniform(0, 0.3) * (x * np.cos(towards) + y * np.sin(towards))
    pixels = grey[..., None] + rng.normal(0, 4, 3) + rng.normal(0, rng.uniform(2, 8), (size, size, 3))
    image: np.ndarray[Any, np.dtype[np.uint8]] = pixels.clip(0, 255).round().astype(np.uint8)
    return image


def write(root: Path, p: params.Synthetic) -> None:
    """Fill `root` with unlabelled/*.jpg and {train,val,test}/<family>/*.jpg, the same bytes for the same params."""
    for part, (split, count) in enumerate(
        {"unlabelled": p.unlabelled, "train": p.train, "val": p.val, "test": p.test}.items()
    ):
        for i in shown(range(count), f"draw {split}", count):
            rng = np.random.default_rng([p.seed, part, i])
            family = list(FAMILIES)[rng.integers(len(FAMILIES))]
            folder = root / split if split == "unlabelled" else root / split / family
            folder.mkdir(parents=True, exist_ok=True)
            quality = int(rng.integers(85, 96))
            (folder / f"{i:06d}.jpg").write_bytes(
                images.encode(Image.fromarray(surface(family, p.size, rng)), "JPEG", quality=quality)
            )
    _plant_defects(root / "unlabelled", p)


def _plant_defects(folder: Path, p: params.Synthetic) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([p.seed, 4])
    for i in range(p.defects):
        whole = images.encode(Image.fromarray(surface("dots", p.size, rng)), "JPEG", quality=90)
        twins = sorted(folder.glob("0*.jpg"))
        kind = ("truncated", "empty", "duplicate", "tiny")[i % 4]
        if kind == "duplicate" and twins:
            content = twins[i % len(twins)].read_bytes()
        else:
            content = {"truncated": whole[: len(whole) // 2], "empty": b"", "duplicate": whole}.get(
                kind, images.encode(Image.fromarray(surface("dots", 8, rng)), "JPEG", quality=90)
            )
        (folder / f"{kind}-{i:03d}.jpg").write_bytes(content)
