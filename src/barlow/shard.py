"""`barlow shard`: pack the accepted images into WebDataset tars; each split is shuffled once, as a whole.

Reads data/accepted.parquet and the images. Writes data/shards/{pretrain,train,val,test}-NNNNNN.tar, an .idx and a .npy
beside each, and classes.json. `pretrain` also holds the images of `train`, without their labels.

Images that are not 8-bit RGB (`model.channels`, `model.bits`) are packed as arrays, in NumPy's .npy format.

Training decodes with DALI, everything else with Pillow, and they must see the same picture. So DALI decodes each file
once, here. A file that DALI decodes to other pixels than Pillow, or not at all, is packed as a PNG of Pillow's pixels.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from barlow.core import bands, dali, files, images, webdataset
from barlow.core.bands import RGB, PixelFormat
from barlow.core.errors import UserError
from barlow.core.progress import Progress
from barlow.data import manifest
from barlow.settings.params import Params

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # of files that may be kept, by format
SHOWN = 3  # names of files in a message


class Source(NamedTuple):
    """An image to pack: columns of the manifest, where `label` is the index of the class, or -1."""

    path: str
    sha256: str
    pixels: int
    format: str
    mode: str
    width: int
    height: int
    bytes: int
    split: str
    label: int


def run(params: Params) -> None:
    """Pack the accepted images. If it fails, data/shards stays as it was.

    Raises:
        UserError: there is nothing to pretrain on, or an image is gone or has changed since ingest.
    """
    sources, classes = read_sources()
    form = PixelFormat(params.model.channels, params.model.bits)
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
        anew = pack_all({folder / name: chunk for name, chunk in tars.items()}, root, params.shard.max_side, form)
        shutil.rmtree(files.SHARDS, ignore_errors=True)
        folder.rename(files.SHARDS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if anew:
        print(
            f"{len(anew)} files are packed as PNG, because DALI, which training uses, does not decode them to Pillow's "
            f"pixels: {', '.join(anew[:SHOWN])}{', ...' if len(anew) > SHOWN else ''}"
        )


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


def pack_all(tars: dict[Path, list[Source]], root: Path, max_side: int | None, form: PixelFormat = RGB) -> list[str]:
    """Write all tars, in one process per CPU, and return the sorted paths of the files that DALI made write anew.

    The number of processes does not change the tars' bytes.
    """
    anew = set[str]()
    total = sum(map(len, tars.values()))
    context = get_context("forkserver")  # not fork: torch, tqdm or a test runner may have started threads here
    context.set_forkserver_preload(dali.PRELOAD)
    with (
        ProcessPoolExecutor(files.cpus(), context) as pool,
        Progress("shard", total) as progress,
    ):
        jobs = {}
        for path, chunk in tars.items():
            processes = ceil(files.cpus() * len(chunk) / total)  # by the tar's share of the work
            jobs[pool.submit(pack, path, chunk, root, max_side, processes, form)] = len(chunk)
        try:
            for job in as_completed(jobs):
                anew.update(job.result())
                progress.update(jobs[job])
        finally:
            pool.shutdown(cancel_futures=True)
    return sorted(anew)


def pack(
    path: Path, sources: list[Source], root: Path, max_side: int | None, processes: int = 1, form: PixelFormat = RGB
) -> list[str]:
    """Write one tar, with a number of DALI's processes, and return the paths of the files that DALI made write anew."""
    anew: list[str] = []
    if form != RGB:
        webdataset.write(path, (array(source, root, max_side, form) for source in sources))
        return anew
    with ExitStack() as stack:
        # The pool's processes have no threads, so they may fork.
        decoders = [stack.enter_context(dali.Decoder(fork=True)) for _ in range(processes)]
        webdataset.write(path, samples(sources, root, max_side, decoders, anew))
    return anew


def samples(
    sources: Iterable[Source], root: Path, max_side: int | None, decoders: list[dali.Decoder], anew: list[str]
) -> Iterator[webdataset.Sample]:
    """Yield the images as they are packed; append to `anew` the paths that `pack` returns.

    A file is kept if DALI decodes it to the very pixels that ingest got from Pillow. No tolerance is needed: not one
    pixel of 3,781 photographs in JPEG differed (Pillow 13.0, DALI 2.4).

    Raises:
        UserError: a file is gone or has changed since ingest.
    """

    def read() -> Iterator[tuple[list[tuple[Source, bytes, bool]], list[bytes]]]:
        for batch in dali.batches(sources, lambda source: source.bytes + 3 * source.width * source.height):
            asked = [_may_stay(source) and not _is_large(source, max_side) for source in batch]
            contents = [_read(root / source.path, source.sha256) for source in batch]
            ask = [data for data, asks in zip(contents, asked, strict=True) if asks]
            yield list(zip(batch, contents, asked, strict=True)), ask

    for batch, answers in dali.in_turn(decoders, read()):
        each = iter(answers)
        for source, data, asked in batch:
            seen = next(each) if asked else None
            if asked and (seen is None or seen.digest != source.pixels):
                anew.append(source.path)
                seen = None
            yield sample(source, data, seen, max_side)


def sample(source: Source, data: bytes, seen: dali.Decoded | None, max_side: int | None) -> webdataset.Sample:
    """Return one image as it is packed: the file as it is where DALI has `seen` Pillow's pixels, else written anew."""
    if seen:
        (height, width), extension = seen[:2], EXTENSIONS[source.format]
    elif max_side is not None and _is_large(source, max_side):
        (data, (width, height)), extension = shrunk(data, max_side), "jpg"
    else:
        pixels = images.decode(data, formats=images.INGESTED)
        (height, width), extension = pixels.shape[:2], "png"
        data = images.encode(Image.fromarray(pixels), "PNG")
    return webdataset.Sample(source.sha256[:24], data, extension, source.label, height, width)


def array(source: Source, root: Path, max_side: int | None, form: PixelFormat) -> webdataset.Sample:
    """Return an image that is not 8-bit RGB as it is packed; raises UserError if the file is gone or has changed."""
    pixels = bands.decode(_read(root / source.path, source.sha256), form, formats=images.INGESTED)
    if max_side is not None:
        pixels = bands.shrunk(pixels, max_side)
    height, width = pixels.shape[:2]
    return webdataset.Sample(source.sha256[:24], bands.pack(pixels), "npy", source.label, height, width)


def _may_stay(source: Source) -> bool:
    """Tell whether a file is kept if DALI agrees. A JPEG of four channels is not: a GPU may convert it differently."""
    return source.format in EXTENSIONS and source.mode != "CMYK"


def _is_large(source: Source, max_side: int | None) -> bool:
    return max_side is not None and max(source.width, source.height) > max_side


def _read(path: Path, sha256: str) -> bytes:
    """Return the content of a file; raises UserError if it is gone or is not the file that ingest saw."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run `barlow ingest` again") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} has changed since ingest; run `barlow ingest` again")
    return data


def shrunk(data: bytes, max_side: int) -> tuple[bytes, tuple[int, int]]:
    """Return an image as a JPEG file whose longer side has at most `max_side` pixels, and its width and height."""
    image = Image.fromarray(images.decode(data, formats=images.INGESTED))
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return images.encode(image, "JPEG", quality=95, subsampling=0), image.size
