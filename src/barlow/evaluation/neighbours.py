"""Nearest neighbours by cosine similarity, and how many of them two encoders have in common."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def most_similar(vectors: Tensor, k: int, queries: int) -> tuple[Tensor, Tensor]:
    """Return similarities and numbers, (queries, k) each, of the other images most similar to each query image.

    The first `queries` images are the query images; all images are searched.
    """
    unit = functional.normalize(vectors.float())
    parts = []
    for start in range(0, min(queries, len(unit)), 256):
        rows = torch.arange(start, min(start + 256, queries, len(unit)))
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf  # an image is not its own neighbour
        parts.append(similarity.topk(k))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def kept(full: Tensor, reduced: Tensor, k: int) -> float | None:
    """Return the share of each image's `k` nearest images that two encoders have in common, as a mean in percent.

    `full` and `reduced` are the two encoders' embeddings (n, dim) of the same images. `k` is lowered to a tenth of the
    images: among few images, a chance encoder too would keep most neighbours. 0 if an embedding is not finite.

    Returns:
        None if there are fewer than two images.
    """
    if len(full) < 2:
        return None
    if not reduced.isfinite().all():
        return 0.0
    k = min(k, max(len(full) // 10, 1))
    wanted, found = (most_similar(vectors, k, len(vectors))[1] for vectors in (full, reduced))
    return 100 * float((wanted[:, :, None] == found[:, None, :]).double().sum((1, 2)).mean() / k)
