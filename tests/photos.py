"""Folders of small pictures, for the tests of what finds them."""

import zlib

import numpy as np
from PIL import Image

from barlow.core import images


def picture(seed, kind="PNG"):
    """The file of 8 x 9 px of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return images.encode(Image.fromarray(noise), kind)


def fill(root, seeds, *folders):
    """Write one picture per seed into each folder, all of them different; return the root."""
    for folder in folders or ("cat", "dog"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            (root / folder / f"{seed}.png").write_bytes(picture(zlib.crc32(f"{folder}{seed}".encode())))
    return root
