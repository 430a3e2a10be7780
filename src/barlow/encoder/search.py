"""Search: an index that `barlow index` wrote, in memory: nearest images, their thumbnails, and places on a map."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from barlow.core.errors import UserError
from barlow.encoder.encoder import Vectors

EXACT = 100_000  # images up to which search compares with all of them
CANDIDATES = 256  # HNSW's efSearch and efConstruction (Malkov and Yashunin, arXiv 1603.09320)
KIND = "barlow index 1"

Ids = np.ndarray[Any, np.dtype[np.int64]]
Places = np.ndarray[Any, np.dtype[np.float32]]  # (n, 2), from -1 to 1


class Item(NamedTuple):
    """An image to index."""

    name: str
    label: str | None
    image: bytes


class Index:
    """An index in memory.

    Attributes:
        names, labels: of the images, in order; a label may be None.
        places: on the map, float32 (n, 2).
        samples: images to try the service with.
    """

    def __init__(self, path: Path, space: str) -> None:
        """Read the file of `space`.

        Raises:
            UserError: it is missing, damaged or of another space.
        """
        remedy = "run `barlow index` for the model that is served"
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                about = json.loads(arrays["about"].tobytes())
                if about["kind"] != KIND:
                    raise ValueError(f"{about['kind']}, not {KIND}")
                if about["space"] != space:
                    raise UserError(f"{path} is of embedding space {about['space']}, not {space}; {remedy}")
                self._vectors = arrays["vectors"]
                self._offsets = arrays["offsets"]
                self._thumbnails: bytes = arrays["thumbnails"].tobytes()
                self.places, self._basis = arrays["places"], arrays["basis"]
                sizes, contents = arrays["sample_sizes"], arrays["samples"].tobytes()
        except FileNotFoundError:
            raise UserError(f"{path} is missing; {remedy}") from None
        except UserError:
            raise
        except Exception as error:  # numpy, zipfile, zlib and json each raise their own
            raise UserError(f"{path} is no whole index ({error!r:.100}); {remedy}") from None
        self.names: list[str] = about["names"]
        self.labels: list[str | None] = about["labels"]
        starts = [0, *itertools.accumulate(sizes.tolist())]
        pairs = zip(about["samples"], itertools.pairwise(starts), strict=True)
        self.samples = [Item(name, label, contents[a:b]) for (name, label), (a, b) in pairs]
        self._approximate = None
        if len(self.names) > EXACT:
            self._approximate = faiss().deserialize_index(self._vectors)
            self._approximate.hnsw.efSearch = CANDIDATES

    def __len__(self) -> int:
        return len(self.names)

    def search(self, embeddings: Vectors, k: int) -> tuple[Ids, Vectors]:
        """Return, of each embedding (n, dim), the `k` nearest images and their cosine similarities, both (n, k)."""
        queries, k = unit(embeddings), min(k, len(self))
        if self._approximate is not None:
            similarities, nearest = self._approximate.search(queries, k)
            return nearest, similarities
        similarities = queries @ self._vectors.T
        nearest = np.argpartition(-similarities, k - 1)[:, :k]
        order = np.argsort(-np.take_along_axis(similarities, nearest, 1), 1, kind="stable")
        nearest = np.take_along_axis(nearest, order, 1)
        return nearest, np.take_along_axis(similarities, nearest, 1)

    def place(self, embeddings: Vectors) -> Places:
        """Return the places of embeddings (n, dim) on the map."""
        return project(unit(embeddings), self._basis)

    def thumbnail(self, i: int) -> bytes:
        """Return the image of number `i` as a small JPEG file; raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self._offsets[i : i + 2].tolist()
        return self._thumbnails[start:end]


def unit(embeddings: Vectors) -> Vectors:
    """Return rows of length 1; rows of 0 stay."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return (embeddings / np.where(norms > 0, norms, 1)).astype(np.float32)


def project(unit: Vectors, basis: Places) -> Places:
    """Return principal components 1 and 2: a plane cut through the space, so new images have an exact place too."""
    return ((unit - basis[0]) @ basis[1:3].T / basis[3, 0]).astype(np.float32)  # type: ignore[no-any-return]


def faiss() -> Any:
    """Import faiss; raises UserError where it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise UserError(f"more than {EXACT:,} images are searched with faiss; pip install 'barlow[faiss]'") from None
    return faiss
