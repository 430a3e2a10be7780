"""The images that the report shows: a map of the test images, nearest neighbours, examples per class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from barlow.core import bands, files, images, webdataset
from barlow.core.errors import UserError
from barlow.evaluation import features
from barlow.evaluation.neighbours import most_similar
from barlow.reporting import pictures

MAPPED = 1000  # images on the map, at most
TILE = 40  # px, side of an image on the map's sheet
PERPLEXITY = 30
QUERIES = 2000  # images whose neighbours are searched
NEIGHBOURS = 6  # per query image
EXAMPLES = 6  # per class
EXAMPLE_CLASSES = 10  # classes with examples, at most

Positions = np.ndarray[Any, np.dtype[np.float64]]


def load(split: str, keys: Iterable[str]) -> dict[str, images.Pixels]:
    """Decode images of a split by key, in threads.

    Raises:
        UserError: there is no such image.
    """
    samples = webdataset.Samples(webdataset.tars(split))
    number = {key: i for i, key in enumerate(samples.keys(np.arange(len(samples))))}
    wanted = sorted(set(keys))
    if missing := [key for key in wanted if key not in number]:
        raise UserError(f"{files.SHARDS} lacks {missing[0]}, which {files.FEATURES} names; run `barlow extract` again")
    data = samples.read(np.array([number[key] for key in wanted], np.int64))
    with ThreadPoolExecutor(files.cpus()) as pool:
        return dict(zip(wanted, pool.map(lambda file: bands.preview(bands.unpack(file)), data), strict=True))


def embedding_map(test: features.Split, classes: list[str]) -> dict[str, Any] | None:
    """Lay out the first test images on a plane, similar ones close together, and put their pixels on one sheet.

    Returns:
        `points`: (x, y in percent of a square, number on the sheet, label), by class and then from left to right;
        None if there are too few images to lay out.
    """
    n = min(MAPPED, len(test.keys))
    if n < 4:
        return None
    keys, labels = test.keys[:n], test.labels[:n].tolist()
    places = plane(test.features[:n])
    pixels = load("test", keys)
    address, columns = pictures.sheet([pixels[key] for key in keys], TILE)
    order = sorted(range(n), key=lambda i: (labels[i], places[i, 0]))
    return {
        "points": [(*places[i].round(1).tolist(), i, labels[i]) for i in order],
        "labels": [(label, classes[label] if label >= 0 else None) for label in sorted(set(labels))],
        "sheet": address,
        "columns": columns,
        "tile": TILE,
    }


def plane(vectors: Tensor) -> Positions:
    """Return (n, 2) places in 3 to 97 by t-SNE of the vectors' directions; the same vectors give the same places."""
    unit = functional.normalize(vectors.float()).numpy()
    init = "pca" if np.ptp(unit, axis=0).max() > 1e-6 else "random"  # collapsed features have no principal components
    tsne = TSNE(init=init, random_state=0, perplexity=min(PERPLEXITY, len(unit) / 4))
    with threadpool_limits(1):  # more threads sum in another order each run: the map would differ; and are slower
        places = tsne.fit_transform(unit).astype(np.float64)
    low, high = places.min(0), places.max(0)
    placed: Positions = 50 + 94 * (places - (low + high) / 2) / (max(high - low) or 1.0)
    return placed


def neighbours(test: features.Split, n: int) -> dict[str, list[dict[str, Any]]]:
    """Return the `best` and the `worst` test images, about `n` in all, each with its nearest by cosine similarity.

    With labels, the best have the most neighbours of their own class and the worst the fewest; ties go to the more
    similar neighbours. Without labels, similarity alone decides. No class appears again before all others have.
    """
    k = min(NEIGHBOURS, len(test.keys) - 1)
    if k < 1:
        return {}
    similarity, nearest = most_similar(test.features, k, QUERIES)
    labels = test.labels[: len(nearest)]
    alike = similarity.mean(1)
    same = (test.labels[nearest] == labels[:, None]).sum(1) if (labels >= 0).all() else None
    ranks = (
        {"best": alike.neg(), "worst": alike}
        if same is None
        else {"best": -same - alike / 4, "worst": same - alike / 4}
    )
    chosen, taken = {}, set[int]()
    for kind, rank in ranks.items():
        rows = list[dict[str, Any]]()
        for i in in_turn(rank.argsort(stable=True).tolist(), labels.tolist()):
            if len(rows) == max(n // 2, 1):
                break
            if i not in taken:
                taken.add(i)
                score = {"same": None if same is None else int(same[i]), "similarity": float(alike[i])}
                rows.append({"images": [i, *nearest[i].tolist()], **score})
        chosen[kind] = rows
    return chosen


def in_turn(order: list[int], labels: list[int]) -> Iterator[int]:
    """Yield the numbers in their order, but one per class and round: no class is ahead by more than one."""
    seen: dict[int, int] = {}
    rounds: dict[int, list[int]] = {}
    for i in order:
        seen[labels[i]] = seen.get(labels[i], 0) + 1
        rounds.setdefault(seen[labels[i]], []).append(i)
    for numbers in rounds.values():
        yield from numbers


def examples(train: features.Split, classes: list[str]) -> list[dict[str, Any]]:
    """Return images of some classes of train; without labels, images of pretrain."""
    if not train.keys:
        samples = webdataset.Samples(webdataset.tars("pretrain"))
        keys = samples.keys(np.arange(min(len(samples), 3 * EXAMPLES)))
        return [{"name": None, "keys": keys, "pixels": load("pretrain", keys)}]
    present = sorted(set(train.labels.tolist()))
    evenly = np.linspace(0, len(present) - 1, min(EXAMPLE_CLASSES, len(present))).round().astype(int)
    chosen = [present[i] for i in evenly]
    by_class: dict[int, list[str]] = {label: [] for label in chosen}
    for key, label in zip(train.keys, train.labels.tolist(), strict=True):
        if len(by_class.get(label, range(EXAMPLES))) < EXAMPLES:
            by_class[label].append(key)
    pixels = load("train", [key for keys in by_class.values() for key in keys])
    return [{"name": classes[label], "keys": keys, "pixels": pixels} for label, keys in by_class.items()]
