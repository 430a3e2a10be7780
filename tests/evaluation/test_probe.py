import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from barlow.evaluation import probe


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 12, generator=generator)
    labels = torch.randint(4, (400,), generator=generator)
    features = (centres[labels] + 1.2 * torch.randn(400, 12, generator=generator)) * torch.linspace(0.1, 5, 12) + 2
    return (features[:300], labels[:300]), (features[300:], labels[300:])


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_linear_equals_scikit_learn(data, l2):
    (x, y), (x_test, _) = data
    weight, bias = probe.fit_linear(x, y, 4, (10 * l2, l2))[l2]
    mean, deviation = x.mean(0), x.std(0, correction=0)
    oracle = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=10_000).fit((x - mean) / deviation, y)
    expected = oracle.predict_proba((x_test - mean) / deviation)
    np.testing.assert_allclose((x_test @ weight.T + bias).softmax(1), expected, atol=2e-3)


@pytest.mark.parametrize("n", [8, 40])
def test_with_fewer_images_than_dimensions_the_optimum_is_the_same(n):
    """Solved in the span of the images; standardised by the statistics of other images, as few-label probes are."""
    generator = torch.Generator().manual_seed(1)
    everything = 3 * torch.randn(200, 30, generator=generator) + 1
    x, y = everything[:n], torch.arange(n) % 4
    weight, bias = probe.fit_linear(x, y, 4, (1e-2,), unlabelled=everything)[1e-2]
    mean, deviation = everything.mean(0), everything.std(0, correction=0)
    oracle = LogisticRegression(C=1 / (1e-2 * n), tol=1e-9, max_iter=10_000).fit((x - mean) / deviation, y)
    expected = oracle.predict_proba((everything - mean) / deviation)
    np.testing.assert_allclose((everything @ weight.T + bias).softmax(1), expected, atol=2e-3)


def test_linear_is_chosen_on_val_alone(data):
    train, val = data
    weight, bias, l2 = probe.choose_linear(train, val, 4, (1e-4, 1e3))
    assert l2 == 1e-4  # the other one shrinks all weights to nothing
    assert probe.accuracy((val[0] @ weight.T + bias).argmax(1), val[1]) > 60


def test_knn_equals_scikit_learn(data):
    (x, y), (x_test, _) = data
    oracle = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d) / 0.1), metric="cosine").fit(x, y)
    scores = probe.knn(x_test, x, y, 4, 20, 0.1)
    np.testing.assert_allclose(scores / scores.sum(1, keepdim=True), oracle.predict_proba(x_test), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.011, 0.01, 0.001, 1e-12])
def test_knn_at_low_temperatures_is_what_float64_says(data, temperature):
    """exp(1 / 0.011) is not finite in float32; in the limit the nearest image decides."""
    (x, y), (x_test, _) = data
    unit, bank = (features.double() / features.double().norm(dim=1, keepdim=True) for features in (x_test, x))
    similarity, nearest = (unit @ bank.T).topk(20)
    logits = similarity / max(temperature, 1e-6)
    votes = torch.zeros(len(x_test), 4, dtype=torch.double)
    votes.scatter_add_(1, y[nearest], (logits - logits.amax(1, keepdim=True)).exp())
    predictions = probe.knn(x_test, x, y, 4, 20, temperature).argmax(1)
    assert len(predictions.unique()) > 1
    # Where float32 rounds two similarities into another order, a low temperature makes much of it.
    assert (predictions == votes.argmax(1)).double().mean() >= 0.98


def test_knn_with_fewer_images_than_k(data):
    (x, y), (x_test, _) = data
    assert probe.knn(x_test, x[:3], y[:3], 4, 20, 0.1).shape == (100, 4)


def test_accuracy_in_percent():
    assert probe.accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0])) == 75


def test_wilson_interval_equals_the_published_example():
    low, high = probe.wilson_interval(100 * 81 / 263, 263)  # Newcombe, 1998, table I
    assert (round(low / 100, 4), round(high / 100, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize("percent", [0.0, 100.0])
def test_wilson_interval_at_the_ends(percent):
    low, high = probe.wilson_interval(percent, 50)
    assert low <= percent + 1e-9
    assert high >= percent - 1e-9
    assert 0 <= low < high <= 100
    assert high - low > 5


def test_effective_rank():
    orthogonal = torch.linalg.qr(torch.randn(50, 8, generator=torch.Generator().manual_seed(0))).Q
    assert probe.effective_rank(orthogonal) == pytest.approx(8, rel=1e-3)
    assert probe.effective_rank(torch.ones(50, 8)) == pytest.approx(1, rel=1e-3)


def test_spread_is_one_where_even_and_zero_where_collapsed():
    z = torch.randn(8192, 64, generator=torch.Generator().manual_seed(0))
    assert probe.spread(z) == pytest.approx(1, abs=0.01)
    assert probe.spread(1000 * z.bfloat16()) == pytest.approx(1, abs=0.01)
    assert probe.spread(z[:1].expand(100, 64)) == pytest.approx(0, abs=1e-6)
    line = torch.arange(1, 101)[:, None] * z[:1]  # all in one direction, however long
    assert probe.spread(line) == pytest.approx(0, abs=1e-6)
    assert 0.01 < probe.spread(z + 10) < 0.2


def test_alignment_and_uniformity_of_known_points():
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert probe.alignment(x, 5 * x) == pytest.approx(0, abs=1e-12)
    assert probe.alignment(x, -x) == pytest.approx(4)
    assert probe.uniformity(x) == pytest.approx(-4)  # one pair at squared distance 2
    ring = torch.tensor([[math.cos(t), math.sin(t)] for t in (0, 2, 4)])
    assert probe.uniformity(ring) < probe.uniformity(torch.tensor([[1.0, 0], [1, 0.1], [1, -0.1]]))


@pytest.mark.parametrize(("p_better", "p_worse"), [(0.05, 0.05), (0.02, 0.1), (0.0, 0.01)])
def test_the_paired_interval_covers_the_difference(p_better, p_worse):
    """Against simulation: about 95 of 100 intervals hold the true difference."""
    rng, n = np.random.default_rng(0), 300
    draws = rng.multinomial(n, [p_better, p_worse, 1 - p_better - p_worse], size=2000).tolist()
    held = [
        low <= 100 * (p_better - p_worse) <= high for low, high in (probe.paired_interval(b, w, n) for b, w, _ in draws)
    ]
    assert 0.93 <= np.mean(held) <= 0.995


def test_the_paired_interval_is_narrower_than_that_of_two_samples():
    low, high = probe.paired_interval(20, 20, 1000)
    assert low == pytest.approx(-high)
    assert high < 1.3  # two independent accuracies of 80 % would be 3.5 points apart by chance


def test_draws_have_as_many_of_each_class_as_asked_for():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 4)
    for each, wanted in {1: (1, 1, 1), 10: (10, 10, 4), 0.1: (5, 3, 1), 0.01: (1, 1, 1)}.items():
        drawn = probe.draw_labels(labels, each, [0, 0])
        assert labels[drawn].bincount().tolist() == list(wanted)
        assert len(drawn.unique()) == len(drawn)
        assert torch.equal(drawn, probe.draw_labels(labels, each, [0, 0]))
    assert not torch.equal(probe.draw_labels(labels, 10, [0, 0]), probe.draw_labels(labels, 10, [0, 1]))


def test_every_image_is_drawn_as_often():
    labels, counts = torch.arange(40) % 2, torch.zeros(40)
    for draw in range(2000):
        counts[probe.draw_labels(labels, 5, [draw])] += 1
    assert counts.min() > 400  # 500 expected, standard deviation 19
    assert counts.max() < 600


@pytest.mark.parametrize("between", [0.0, 4.0])
def test_the_interval_of_a_mean_covers_it(between):
    """Against simulation: the accuracy varies from draw to draw, and the test images are a sample."""
    rng, n, held = np.random.default_rng(0), 400, 0
    for _ in range(1000):
        difficulty = rng.normal(0, 1, n)  # of the test images, the same for all draws
        top1 = []
        for shift in rng.normal(0, between / 100 / 0.3, 5):  # the density of a normal at its 0.7 quantile is about 0.35
            top1.append(100 * float((difficulty < 0.5244 + shift).mean()))
        low, high = probe.mean_interval(top1, n)
        held += low <= 70 <= high
    assert held >= 935


def test_the_interval_of_one_is_wilsons_and_of_several_holds_students():
    assert probe.mean_interval([80.0], 100) == pytest.approx(probe.wilson_interval(80.0, 100))
    low, high = probe.mean_interval([60.0, 70.0, 80.0], 10**9)  # no error of the test images
    assert (low, high) == pytest.approx((70 - 24.84, 70 + 24.84), abs=0.01)  # 4.3027 * 10 / sqrt(3)
    assert probe.mean_interval([0.0, 100.0], 50) == (0.0, 100.0)


def test_redundancy_is_the_root_mean_square_correlation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 5
    c = np.corrcoef(x.T)
    expected = np.sqrt((c[~np.eye(6, dtype=bool)] ** 2).mean())
    assert probe.redundancy(torch.tensor(x).float()) == pytest.approx(expected, rel=1e-4)
    assert probe.redundancy(torch.ones(50, 8)) == 0
    assert probe.redundancy(torch.tensor(x[:, :1]).float().repeat(1, 4)) == pytest.approx(1)
