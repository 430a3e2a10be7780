"""`barlow index [FILE|FOLDER ...]`: write the index that `barlow serve` searches: embeddings, thumbnails and a map.

Reads an ONNX encoder and the images that are named. Without names it takes the images of the newest index or, if there
is none, the training images in data/shards. Writes models/index/SPACE.npz, where SPACE is the id of the embedding
space. So each encoder has an index of its own.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from barlow.core import files, images, webdataset
from barlow.core.bands import PixelFormat, Pixels, decode, preview, unpack
from barlow.core.errors import UserError
from barlow.core.walk import read
from barlow.encoder import search
from barlow.encoder.encoder import MAX_PIXELS, Encoder, unit
from barlow.encoder.reading import find
from barlow.encoder.search import Item

THUMBNAIL = 64  # px, the longer side
SAMPLES = 12  # images to try the service with
AHEAD = 8  # images per processor that are decoded ahead: a photograph takes 36 MB


def run(
    paths: Sequence[Path | str] = (),
    model: Path | str = files.ONNX,
    out: Path | str = files.INDEX,
    keep: bool = False,
) -> None:
    """Embed the images and write the index; with `keep`, an index of this embedding space is left as it is.

    Raises:
        UserError: the model or the images cannot be used, or `out` is a file.
    """
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out {out} is a file; name a folder, such as {files.INDEX}")
    encoder = Encoder(model)
    target = Path(out) / f"{encoder.metadata['space']}.npz"
    if keep and target.exists():
        print(f"{target} is there")
        return
    paths = paths or _paths_of_newest(Path(out))
    items, samples = (_from_paths(paths), None) if paths else _from_shards()
    decode_item = partial(_decode, form=encoder.form if paths else None)
    thumbnails, first = list[Item](), list[Item]()

    def decoded() -> Iterator[Pixels]:
        with ThreadPoolExecutor(files.cpus()) as pool:
            while chunk := list(itertools.islice(items, AHEAD * files.cpus())):
                for item, image in zip(chunk, pool.map(decode_item, chunk), strict=True):
                    if isinstance(image, str):
                        print(f"barlow index: {item.name}: {image}", file=sys.stderr)
                        continue
                    pixels, thumbnail = image
                    thumbnails.append(item._replace(image=thumbnail))
                    if len(first) < SAMPLES:
                        first.append(item)
                    yield pixels

    batches = [unit(embeddings) for embeddings, _ in encoder.run(decoded())]
    if not batches:
        raise UserError(f"no image in {', '.join(map(str, paths)) or files.SHARDS}; name image files or a folder")
    vectors = np.concatenate(batches)
    if not np.isfinite(vectors).all():
        raise UserError(f"{model} gives NaN or infinity; run `barlow pretrain` and `barlow export` again")
    samples = first if samples is None else samples
    absolute = [os.fspath(Path(path).absolute()) for path in paths]
    search.write(target, encoder.metadata["space"], vectors, thumbnails, samples, absolute)
    print(f"{target}: {len(thumbnails)} images, {target.stat().st_size / 2**20:.1f} MiB")


def _paths_of_newest(folder: Path) -> list[str]:
    """Return the paths that the newest index was made of; none for the training images, or without an index."""
    newest = max(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime_ns, default=None)
    paths = search.indexed_paths(newest) if newest else []
    if paths:
        print(f"of {', '.join(paths)}, as {newest} is")
    return paths


def _from_paths(paths: Iterable[Path | str]) -> Iterator[Item]:
    """Yield the image files of paths. The label is the name of a file's folder, if that lies below a named folder."""
    for path in paths:
        for name in find([path]):
            readable = os.fsencode(name).decode(errors="backslashreplace")  # JSON has no other bytes
            inside = Path(os.path.relpath(readable, os.fsencode(path).decode(errors="backslashreplace")))
            label = inside.parent.name or None
            try:
                yield Item(os.fspath(inside) if label else readable, label, read(name))
            except OSError as error:
                print(f"barlow index: {name}: {error.strerror or error}", file=sys.stderr)


def _from_shards() -> tuple[Iterator[Item], list[Item]]:
    """Return the training images, each once, and a few test images: one per class in turn."""
    names, classes = (
        webdataset.sources(),
        webdataset.classes() if (files.SHARDS / webdataset.CLASSES_FILE).exists() else [],
    )

    def item(sample: webdataset.Sample) -> Item:
        label = classes[sample.label] if sample.label >= 0 else None
        return Item(names.get(sample.key, sample.key), label, sample.data)

    def training() -> Iterator[Item]:
        seen = set[str]()  # most images of train are in pretrain too, without their labels
        for sample in webdataset.read(tar for split in ("train", "pretrain") for tar in webdataset.tars(split)):
            if sample.key not in seen:
                seen.add(sample.key)
                yield item(sample)

    rounds: dict[int, int] = {}
    chosen: list[tuple[int, webdataset.Sample]] = []
    for sample in itertools.islice(webdataset.read(webdataset.tars("test")), 1000):
        if sample.extension == "npy":  # not a file that could be sent to the service
            break
        rounds[sample.label] = rounds.get(sample.label, -1) + 1
        chosen.append((rounds[sample.label], sample))
    return training(), [item(sample) for _, sample in sorted(chosen, key=lambda pair: pair[0])[:SAMPLES]]


def _decode(item: Item, form: PixelFormat | None) -> tuple[Pixels, bytes] | str:
    """Return the image's pixels and its thumbnail, or the reason why it cannot be decoded; no `form`: of a shard."""
    try:
        pixels = decode(item.image, form, MAX_PIXELS) if form else unpack(item.image)
    except ValueError as error:
        return str(error)
    return pixels, images.jpeg(preview(pixels), THUMBNAIL)
