"""`barlow index [FILE|FOLDER ...]`: what `barlow serve` searches in: embeddings of images, with thumbnails and a map.

Reads an ONNX encoder and the images named or, by default, those of the newest index there is, or else those of
data/shards that it was trained on. Writes models/index/SPACE.npz, where SPACE is the id of the embedding space; so
indexes of several encoders lie side by side, and one of another encoder is never searched.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from barlow.core import files, images, webdataset
from barlow.core.errors import UserError
from barlow.core.images import decode
from barlow.encoder.encoder import MAX_PIXELS, Encoder, Pixels, Vectors
from barlow.encoder.reading import find
from barlow.encoder.search import CANDIDATES, EXACT, KIND, Item, Places, faiss, project, unit

NEIGHBOURS = 32  # HNSW's M
THUMBNAIL = 64  # px, the longer side
SAMPLES = 12  # images to try the service with
AHEAD = 8  # images a processor decodes ahead: photographs of 36 MB each are no trouble


def run(
    paths: Sequence[Path | str] = (),
    model: Path | str = files.ONNX,
    out: Path | str = files.INDEX,
    keep: bool = False,
) -> None:
    """Embed the images and write the index; with `keep`, not if there is one of this embedding space.

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
    paths = paths or _again(Path(out))
    items, samples = (_found(paths), None) if paths else _from_shards()
    names, labels, vectors, thumbnails = list[str](), list[str | None](), list[Vectors](), list[bytes]()
    kept: list[Item] = []

    def decoded() -> Iterator[Pixels]:
        with ThreadPoolExecutor(files.cpus()) as pool:
            while chunk := list(itertools.islice(items, AHEAD * files.cpus())):
                for item, found in zip(chunk, pool.map(_read, chunk), strict=True):
                    if isinstance(found, str):
                        print(f"barlow index: {item.name}: {found}", file=sys.stderr)
                        continue
                    pixels, thumbnail = found
                    names.append(item.name)
                    labels.append(item.label)
                    thumbnails.append(thumbnail)
                    if samples is None and len(kept) < SAMPLES:
                        kept.append(item)
                    yield pixels

    vectors = [unit(embeddings) for embeddings, _ in encoder.run(decoded())]
    if not names:
        raise UserError(f"no image in {', '.join(map(str, paths)) or files.SHARDS}; name image files or a folder")
    kept = kept if samples is None else samples
    rows = np.concatenate(vectors)
    if not np.isfinite(rows).all():
        raise UserError(f"{model} gives NaN or infinity; run `barlow pretrain` and `barlow export` again")
    basis = _basis(rows)
    header: dict[str, Any] = {"kind": KIND, "space": encoder.metadata["space"], "names": names, "labels": labels}
    header["paths"] = [os.fspath(Path(path).absolute()) for path in paths]
    header["samples"] = [(item.name, item.label) for item in kept]
    with files.replacing(target) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            about=np.frombuffer(json.dumps(header).encode(), np.uint8),
            vectors=rows if len(rows) <= EXACT else _graph(rows),
            places=project(rows, basis),
            basis=basis,
            offsets=np.cumsum([0, *map(len, thumbnails)]),
            thumbnails=np.frombuffer(b"".join(thumbnails), np.uint8),
            sample_sizes=np.array([len(item.image) for item in kept], np.int64),
            samples=np.frombuffer(b"".join(item.image for item in kept), np.uint8),
        )
    print(f"{target}: {len(names)} images, {target.stat().st_size / 2**20:.1f} MiB")


def _again(folder: Path) -> list[str]:
    """Return what the newest index is of; nothing where it is of the training images, or there is none."""
    newest = max(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None:
        return []
    try:
        with newest.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            paths: list[str] = json.loads(arrays["about"].tobytes())["paths"]
    except Exception as error:  # numpy, zipfile, zlib and json each raise their own
        raise UserError(f"{newest} is no whole index ({error!r:.100}); remove it, or name the images") from None
    if paths:
        print(f"of {', '.join(paths)}, as {newest} is")
    return paths


def _found(paths: Iterable[Path | str]) -> Iterator[Item]:
    """Yield files; a folder's name is the label of what lies in it, where that is in a folder that was named."""
    for path in paths:
        for name in find([path]):
            readable = os.fsencode(name).decode(errors="backslashreplace")  # JSON has no other bytes
            inside = Path(os.path.relpath(readable, os.fsencode(path).decode(errors="backslashreplace")))
            label = inside.parent.name or None
            try:
                yield Item(os.fspath(inside) if label else readable, label, Path(name).read_bytes())
            except OSError as error:
                print(f"barlow index: {name}: {error.strerror}", file=sys.stderr)


def _from_shards() -> tuple[Iterator[Item], list[Item]]:
    """Return the training images, each once, and a few test images, of each class in turn."""
    names, classes = _names(), webdataset.classes() if (files.SHARDS / webdataset.CLASSES_FILE).exists() else []

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
        rounds[sample.label] = rounds.get(sample.label, -1) + 1
        chosen.append((rounds[sample.label], sample))
    return training(), [item(sample) for _, sample in sorted(chosen, key=lambda pair: pair[0])[:SAMPLES]]


def _names() -> dict[str, str]:
    """Return the paths of the accepted images by their keys in the shards; none where the manifest is gone."""
    if not files.ACCEPTED.exists():
        return {}
    from pyarrow import parquet  # comes with the stage that wrote the file

    rows = parquet.read_table(files.ACCEPTED, columns=["path", "sha256"]).to_pydict()
    return {sha256[:24]: path for path, sha256 in zip(rows["path"], rows["sha256"], strict=True)}


def _read(item: Item) -> tuple[Pixels, bytes] | str:
    """Return the image's pixels and its thumbnail, or why there are none."""
    try:
        pixels = decode(item.image, MAX_PIXELS)
    except ValueError as error:
        return str(error)
    return pixels, images.jpeg(pixels, THUMBNAIL)


def _basis(rows: Vectors) -> Places:
    """Return what `search.project` needs: mean, two principal axes and the scale of the map, (4, dim)."""
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean)
    axes = np.linalg.eigh(covariance)[1][:, :-3:-1].T  # of the two largest variances
    extent = max(float(np.abs((rows - mean) @ axes.T).max()), 1e-6)
    return np.stack([mean, *axes, np.full_like(mean, extent)])


def _graph(rows: Vectors) -> Any:
    """Return a navigable graph over the vectors, serialised as bytes (n,)."""
    library = faiss()
    graph = library.IndexHNSWFlat(rows.shape[1], NEIGHBOURS, library.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = CANDIDATES
    graph.add(rows)
    return library.serialize_index(graph)
