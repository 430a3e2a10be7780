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


def test_a_feature_that_varies_by_rounding_alone_gets_no_weight(data):
    """A mean over pixels in another order differs in the last place; divided by its deviation it would be a feature."""
    (x, y), _ = data
    constant = torch.full((len(x), 1), 635.0)
    constant[::2] = torch.nextafter(constant[::2], torch.tensor(torch.inf))
    expected, _ = probe.fit_linear(x, y, 4, (1e-3,))[1e-3]
    weight, _ = probe.fit_linear(torch.cat([x, constant, torch.zeros(len(x), 1)], 1), y, 4, (1e-3,))[1e-3]
    torch.testing.assert_close(weight[:, :-2], expected, atol=2e-3, rtol=1e-2)
    assert weight[:, -2:].abs().max() < 1e-2


def test_a_small_spread_that_is_no_rounding_counts(data):
    (x, _), _ = data
    assert torch.allclose(probe.scale(1e-3 * x + 1), 1e-3 * x.std(0, correction=0), rtol=1e-3)


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
