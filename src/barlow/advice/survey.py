"""A look at the accepted images: how many, how large, grey or colour; and a sample, to measure a step with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from barlow.advice.recipe import Images
from barlow.core import bands, images, webdataset
from barlow.core.bands import RGB, PixelFormat
from barlow.core.errors import UserError

GREY_MODES = {"1", "L", "LA", "I", "F", "I;16", "I;16B"}
SAMPLE = (60, 200)  # images looked at, at least and at most
SAMPLE_PIXELS = 500_000_000  # decoded in all, if that is between
TINT = 3.0  # mean difference of an image's largest and smallest channel, up to which it is grey: JPEG adds a little
GREY = 0.98  # share of grey images in a sample, from which the set is grey
QUALITY = 95  # of JPEG, as `barlow shard` writes it


def look(accepted: pa.Table, root: Path, max_side: int | None, shard: Path, form: PixelFormat = RGB) -> Images:
    """Return the facts about the images to pretrain on, and pack a sample of them as one shard.

    The sample is shrunk as `shard.max_side` would.

    Args:
        accepted: rows of the manifest.
        root: the folder that their paths are relative to.
        max_side: px, or None.
        shard: the tar to write.

    Raises:
        UserError: there is no image to pretrain on, or one is gone since ingest.
    """
    rows = accepted.filter(pc.is_in(accepted["split"], pa.array(["pretrain", "train"])))
    if not rows.num_rows:
        raise UserError("no image of the splits pretrain and train was accepted, so there is nothing to choose for")
    sides = np.sort(np.stack([rows["width"].to_numpy(), rows["height"].to_numpy()]), axis=0)
    pixels = int(np.median(sides.prod(axis=0, dtype=np.int64)))
    n = min(int(np.clip(SAMPLE_PIXELS // max(pixels, 1), *SAMPLE)), rows.num_rows)
    drawn = np.random.default_rng(0).choice(rows.num_rows, n, replace=False)
    paths = rows["path"].take(np.sort(drawn)).to_pylist()
    samples, greys = [], 0
    for number, path in enumerate(paths):
        sample, tint = _sample(root / path, max_side, f"{number:024x}", form)
        samples.append(sample)
        greys += tint <= TINT
    webdataset.write(shard, samples)
    coloured = set(rows["mode"].to_pylist()) - GREY_MODES
    grey = form.channels != 3 or not coloured or greys >= GREY * n
    return Images(rows.num_rows, int(np.median(sides[0])), int(np.quantile(sides[1], 0.9)), grey, _labelled(accepted))


def _sample(path: Path, max_side: int | None, key: str, form: PixelFormat) -> tuple[webdataset.Sample, float]:
    """Return an image as it is packed, and how coloured it is: the mean of largest less smallest channel."""
    try:
        pixels = bands.decode(path.read_bytes(), form, formats=images.INGESTED)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read any more ({error}); run `barlow ingest` again") from None
    if form != RGB:
        pixels = pixels if max_side is None else bands.shrunk(pixels, max_side)
        height, width = pixels.shape[:2]
        tint = float(np.ptp(bands.preview(pixels).astype(np.int16), axis=2).mean())
        return webdataset.Sample(key, bands.pack(pixels), "npy", -1, height, width), tint
    image = Image.fromarray(pixels)
    if max_side is not None:
        image.thumbnail((max_side, max_side))
    small = np.asarray(image).astype(np.int16)
    data = images.encode(image, "JPEG", quality=QUALITY, subsampling=0)
    sample = webdataset.Sample(key, data, "jpg", -1, image.height, image.width)
    return sample, float(np.ptp(small, axis=2).mean())


def _labelled(accepted: pa.Table) -> dict[str, int]:
    splits = accepted.filter(pc.is_valid(accepted["label"]))["split"].to_pylist()
    return dict(Counter(splits))
