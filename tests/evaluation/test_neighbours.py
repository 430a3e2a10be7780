import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from barlow.evaluation import neighbours


def vectors(n, seed=0, dim=8):
    return torch.tensor(np.random.default_rng(seed).normal(size=(n, dim)), dtype=torch.float32)


def nearest(x, k):
    """Each row's k nearest others by scikit-learn."""
    return NearestNeighbors(n_neighbors=k, metric="cosine").fit(x.double().numpy()).kneighbors()


@pytest.mark.parametrize("queries", [1000, 25])
def test_the_most_similar_as_scikit_learn_finds_them(queries):
    x = vectors(300)
    similarity, found = neighbours.most_similar(x, 4, queries)
    distances, wanted = nearest(x, 4)
    n = min(queries, 300)
    assert (found.numpy() == wanted[:n]).all()
    np.testing.assert_allclose(similarity.numpy(), 1 - distances[:n], atol=1e-5)


@pytest.mark.parametrize(("images", "k", "used"), [(300, 5, 5), (300, 200, 30), (40, 10, 4), (9, 10, 1)])
def test_the_share_kept_is_that_of_scikit_learns_neighbours(images, k, used):
    full = vectors(images)
    reduced = full + 0.5 * vectors(images, seed=1)
    sets = [[set(row) for row in nearest(x, used)[1]] for x in (full, reduced)]
    wanted = 100 * np.mean([len(a & b) / used for a, b in zip(*sets, strict=True)])
    assert neighbours.kept(full, reduced, k) == pytest.approx(wanted)
    assert 0 < wanted < 100


def test_an_encoder_keeps_all_of_its_own_and_lengths_do_not_count():
    full = vectors(200)
    assert neighbours.kept(full, full * torch.rand(200, 1).add(0.1), 10) == 100


def test_by_chance_few_are_kept():
    assert neighbours.kept(vectors(1000), vectors(1000, seed=1), 500) == pytest.approx(10, abs=1)  # 100 of 999


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_embedding_that_is_not_finite_keeps_nothing(value):
    reduced = vectors(200)
    reduced[7, 3] = value
    assert neighbours.kept(vectors(200), reduced, 10) == 0


def test_one_image_has_no_neighbour():
    assert neighbours.kept(vectors(1), vectors(1), 10) is None
    assert neighbours.kept(vectors(0), vectors(0), 10) is None
    assert neighbours.kept(vectors(2), vectors(2), 10) == 100
