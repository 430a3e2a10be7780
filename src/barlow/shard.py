"""`barlow shard`: pack the accepted images into WebDataset tars; each split is shuffled once, as a whole.

Reads data/accepted.parquet and the images. Writes data/shards/{pretrain,train,val,test}-NNNNNN.tar, an .idx and a .npy
beside each, and classes.json. `pretrain` also holds the images of `train`, without their labels.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from barlow.core import files, images, webdataset
from barlow.core.errors import UserError
from barlow.core.progress import Progress
from barlow.data import manifest
from barlow.settings.params import Params

# Files of these formats are kept as they are in modes L and RGB, in which DALI decodes them to the same pixels as
# `images.decode`. An MPO file is a JPEG file with more images after the first.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class Source(NamedTuple):
    """An image to pack: columns of the manifest, where `label` is the index of the class, or -1."""

    path: str
    sha256: str
    format: str
    mode: str
    width: int
    height: int
    bytes: int
    orientation: int | None
    split: str
    label: int


def run(params: Params) -> None:
    """Pack the accepted images. If it fails, data/shards stays as it was.

    Raises:
        UserError: there is nothing to pretrain on, or an image is gone or has changed since ingest.
    """
    sources, classes = read_sources()
    root = manifest.root(params.ingest)
    tars = plan(sources, params.shard.seed, params.shard.max_bytes)
    if not any(name.startswith("pretrain") for name in tars):
        raise UserError(
            f"{files.ACCEPTED} has no image of the splits pretrain and train, so there is nothing to pretrain on; "
            f"add images to ingest.source={params.ingest.source!r}"
        )
    folder = files.SHARDS.with_name(f".{files.SHARDS.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        files.write_json(folder / webdataset.CLASSES_FILE, classes)
        pack_all({folder / name: chunk for name, chunk in tars.items()}, root, params.shard.max_side)
        shutil.rmtree(files.SHARDS, ignore_errors=True)
        folder.rename(files.SHARDS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_sources(path: Path = files.ACCEPTED) -> tuple[list[Source], list[str]]:
    """Return the accepted images and the sorted class names; a label is an index into these."""
    columns: dict[str, list[Any]] = manifest.read(path).select(Source._fields).to_pydict()
    classes = sorted(set(columns["label"]) - {None})
    indexes = {None: -1} | {name: i for i, name in enumerate(classes)}
    columns["label"] = [indexes[name] for name in columns["label"]]
    return [Source(*row) for row in zip(*columns.values(), strict=True)], classes


def plan(sources: Iterable[Source], seed: int, max_bytes: int) -> dict[str, list[Source]]:
    """Return the images of each tar by its name, the same for the same images in any order."""
    splits: dict[str, list[Source]] = {split: [] for split in manifest.SPLITS}
    for source in sorted(sources, key=lambda source: (source.sha256, source.path)):
        if source.split in ("pretrain", "train"):
            splits["pretrain"].append(source._replace(label=-1))
        if source.split != "pretrain":
            splits[source.split].append(source)
    tars = {}
    for split, members in splits.items():
        order = np.random.default_rng(seed).permutation(len(members))
        for i, chunk in enumerate(_cut([members[j] for j in order], max_bytes)):
            tars[f"{split}-{i:06d}.tar"] = chunk
    return tars


def _cut(sources: list[Source], max_bytes: int) -> Iterator[list[Source]]:
    """Yield runs of images whose files have at most `max_bytes` together; a larger file is a run of its own."""
    chunk: list[Source] = []
    total = 0
    for source in sources:
        if chunk and total + source.bytes > max_bytes:
            yield chunk
            chunk, total = [], 0
        chunk.append(source)
        total += source.bytes
    if chunk:
        yield chunk


def pack_all(tars: dict[Path, list[Source]], root: Path, max_side: int | None) -> None:
    """Write all tars, in one process per CPU; the number of processes does not change their bytes."""
    with (
        # Not fork: torch, tqdm or a test runner may have started threads in this process.
        ProcessPoolExecutor(files.cpus(), get_context("forkserver")) as pool,
        Progress("shard", sum(map(len, tars.values()))) as progress,
    ):
        jobs = {pool.submit(pack, path, chunk, root, max_side): len(chunk) for path, chunk in tars.items()}
        try:
            for job in as_completed(jobs):
                job.result()
                progress.update(jobs[job])
        finally:
            pool.shutdown(cancel_futures=True)


def pack(path: Path, sources: list[Source], root: Path, max_side: int | None) -> None:
    """Write one tar."""
    webdataset.write(path, (sample(source, root, max_side) for source in sources))


def sample(source: Source, root: Path, max_side: int | None) -> webdataset.Sample:
    """Read one image. Its file is kept as it is, unless it is too large or DALI would decode other pixels.

    Raises:
        UserError: the file is gone or has changed since ingest.
    """
    try:
        data = (root / source.path).read_bytes()
    except OSError as error:
        raise UserError(f"{root / source.path} cannot be read ({error.strerror}); run `barlow ingest` again") from None
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise UserError(f"{root / source.path} has changed since ingest; run `barlow ingest` again")
    height, width = source.height, source.width
    if (source.orientation or 1) >= 5:  # in EXIF: rotated by 90 degrees
        height, width = width, height
    if max_side is not None and max(width, height) > max_side:
        (data, (width, height)), extension = shrunk(data, max_side), "jpg"
    elif source.format in KEPT and source.mode in ("L", "RGB") and _dali_turns(data, source.orientation or 1):
        extension = KEPT[source.format]
    else:
        data, extension = images.encode(Image.fromarray(images.decode(data, formats=images.INGESTED)), "PNG"), "png"
    return webdataset.Sample(source.sha256[:24], data, extension, source.label, height, width)


def shrunk(data: bytes, max_side: int) -> tuple[bytes, tuple[int, int]]:
    """Return an image as a JPEG file whose longer side has at most `max_side` pixels, and its width and height."""
    image = Image.fromarray(images.decode(data, formats=images.INGESTED))
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return images.encode(image, "JPEG", quality=95, subsampling=0), image.size


def _dali_turns(data: bytes, orientation: int) -> bool:
    """Tell whether DALI finds the orientation that Pillow found: DALI looks in EXIF only, Pillow in XMP as well."""
    if orientation == 1:
        return True
    Image.MAX_IMAGE_PIXELS = None  # ingest has applied ingest.max_pixels; only the header is read here
    exif = Image.Exif()
    exif.load(Image.open(io.BytesIO(data)).info.get("exif", b""))
    return bool(exif.get(0x0112) == orientation)
