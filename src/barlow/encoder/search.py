"""Search: the index's file, the nearest images of an embedding, their thumbnails and their places on a map.

An index is one .npz file per embedding space. Its arrays, for n images:

about         JSON as bytes: kind, space, names, labels, paths and samples (pairs of name and label)
vectors       embeddings of length 1, float32 (n, dim); for more than EXACT images a faiss graph, as bytes
places        positions on the map, float32 (n, 2)
basis         for `project`, float32 (4, dim)
offsets       int64 (n + 1,): thumbnail i is thumbnails[offsets[i] : offsets[i + 1]]
thumbnails    small JPEG files, one after the other
sample_sizes  bytes per sample, int64 (samples,)
samples       image files, one after the other
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from barlow.core import files
from barlow.core.errors import UserError
from barlow.encoder.encoder import Vectors, unit

EXACT = 100_000  # up to this many images, search compares a query with every one
NEIGHBOURS = 32  # M of HNSW (Malkov and Yashunin, arXiv 1603.09320)
CANDIDATES = 256  # its efSearch and efConstruction
KIND = "barlow index 1"

Ids = np.ndarray[Any, np.dtype[np.int64]]
Places = np.ndarray[Any, np.dtype[np.float32]]  # (n, 2), from -1 to 1


class Item(NamedTuple):
    """An image file with its name and its label."""

    name: str
    label: str | None
    image: bytes


def write(
    path: Path,
    space: str,
    vectors: Vectors,
    thumbnails: Sequence[Item],
    samples: Sequence[Item],
    paths: Sequence[str] = (),
) -> None:
    """Write an index, whole or not at all.

    Args:
        path: the file to write.
        space: id of the embedding space.
        vectors: embeddings of length 1, (n, dim).
        thumbnails: names, labels and small JPEG files of the n images.
        samples: images to try the service with.
        paths: the files and folders that were indexed; none for the training images.

    Raises:
        UserError: there are more than EXACT images, and faiss is not installed.
    """
    basis = _basis(vectors)
    about: dict[str, Any] = {"kind": KIND, "space": space}
    about["names"] = [item.name for item in thumbnails]
    about["labels"] = [item.label for item in thumbnails]
    about["paths"] = [*paths]
    about["samples"] = [(item.name, item.label) for item in samples]
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            vectors=vectors if len(vectors) <= EXACT else _graph(vectors),
            places=project(vectors, basis),
            basis=basis,
            offsets=np.cumsum([0, *(len(item.image) for item in thumbnails)]),
            thumbnails=np.frombuffer(b"".join(item.image for item in thumbnails), np.uint8),
            sample_sizes=np.array([len(item.image) for item in samples], np.int64),
            samples=np.frombuffer(b"".join(item.image for item in samples), np.uint8),
        )


def indexed_paths(path: Path) -> list[str]:
    """Return the files and folders that were indexed; none for the training images.

    Raises:
        UserError: the file is damaged.
    """
    with _open(path, "remove it, or name the images") as (about, _):
        paths: list[str] = about["paths"]
    return paths


@contextmanager
def _open(path: Path, remedy: str) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Yield `about` and the arrays, which are read on demand; any damage becomes a UserError with the remedy."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            yield json.loads(arrays["about"].tobytes()), arrays
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile, zlib and json each raise their own
        raise UserError(f"{path} is no whole index ({error!r:.100}); {remedy}") from None


class Index:
    """An index in memory.

    Attributes:
        names, labels: one per image; a label may be None.
        places: positions on the map, float32 (n, 2), from -1 to 1.
        samples: images to try the service with.
    """

    def __init__(self, path: Path, space: str) -> None:
        """Read the file of an embedding space.

        Raises:
            UserError: the file is missing, damaged or of another space.
        """
        served = " for the model that is served"
        files.require(path, "index", served)
        remedy = f"run `barlow index`{served}"
        with _open(path, remedy) as (about, arrays):
            if about["kind"] != KIND:
                raise ValueError(f"{about['kind']}, not {KIND}")
            if about["space"] != space:
                raise UserError(f"{path} is of embedding space {about['space']}, not {space}; {remedy}")
            self._vectors = arrays["vectors"]
            self._offsets = arrays["offsets"]
            self._thumbnails: bytes = arrays["thumbnails"].tobytes()
            self.places, self._basis = arrays["places"], arrays["basis"]
            sizes, contents = arrays["sample_sizes"], arrays["samples"].tobytes()
        self.names: list[str] = about["names"]
        self.labels: list[str | None] = about["labels"]
        starts = [0, *itertools.accumulate(sizes.tolist())]
        samples = zip(about["samples"], itertools.pairwise(starts), strict=True)
        self.samples = [Item(name, label, contents[start:end]) for (name, label), (start, end) in samples]
        self._graph = None
        if len(self.names) > EXACT:
            self._graph = faiss().deserialize_index(self._vectors)
            self._graph.hnsw.efSearch = CANDIDATES

    def __len__(self) -> int:
        return len(self.names)

    def search(self, embeddings: Vectors, k: int) -> tuple[Ids, Vectors]:
        """Return the numbers of the `k` nearest images of each embedding (n, dim) and their cosines, both (n, k)."""
        queries, k = unit(embeddings), min(k, len(self))
        if self._graph is not None:
            similarities, nearest = self._graph.search(queries, k)
            return nearest, similarities
        similarities = queries @ self._vectors.T
        nearest = np.argpartition(-similarities, k - 1)[:, :k]
        order = np.argsort(-np.take_along_axis(similarities, nearest, 1), 1, kind="stable")
        nearest = np.take_along_axis(nearest, order, 1)
        return nearest, np.take_along_axis(similarities, nearest, 1)

    def place(self, embeddings: Vectors) -> Places:
        """Return the positions of embeddings (n, dim) on the map."""
        return project(unit(embeddings), self._basis)

    def thumbnail(self, i: int) -> bytes:
        """Return the thumbnail of image `i`, a JPEG file; raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self._offsets[i : i + 2].tolist()
        return self._thumbnails[start:end]


def project(vectors: Vectors, basis: Vectors) -> Places:
    """Return the first two principal components of unit vectors (n, dim); so new images have an exact place too."""
    return ((vectors - basis[0]) @ basis[1:3].T / basis[3, 0]).astype(np.float32)  # type: ignore[no-any-return]


def _basis(vectors: Vectors) -> Vectors:
    """Return what `project` needs, (4, dim): the mean, two principal axes, and the map's scale in every column."""
    mean = vectors.mean(0)
    covariance = (vectors - mean).T @ (vectors - mean)
    axes = np.linalg.eigh(covariance)[1][:, :-3:-1].T  # of the two largest variances
    extent = max(float(np.abs((vectors - mean) @ axes.T).max()), 1e-6)
    return np.stack([mean, *axes, np.full_like(mean, extent)])


def _graph(vectors: Vectors) -> Any:
    """Return a navigable graph over the vectors (HNSW), serialised as uint8 (bytes,)."""
    library = faiss()
    graph = library.IndexHNSWFlat(vectors.shape[1], NEIGHBOURS, library.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = CANDIDATES
    graph.add(vectors)
    return library.serialize_index(graph)


def faiss() -> Any:
    """Import faiss; raises UserError if it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise UserError(f"more than {EXACT:,} images are searched with faiss; pip install 'barlow[faiss]'") from None
    return faiss
