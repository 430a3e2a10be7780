import numpy as np
import pytest
import torch

from barlow.evaluation import intervals


def test_wilson_interval_equals_the_published_example():
    low, high = intervals.wilson_interval(100 * 81 / 263, 263)  # Newcombe, 1998, table I
    assert (round(low / 100, 4), round(high / 100, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize("percent", [0.0, 100.0])
def test_wilson_interval_at_the_ends(percent):
    low, high = intervals.wilson_interval(percent, 50)
    assert low <= percent + 1e-9
    assert high >= percent - 1e-9
    assert 0 <= low < high <= 100
    assert high - low > 5


@pytest.mark.parametrize(("p_better", "p_worse"), [(0.05, 0.05), (0.02, 0.1), (0.0, 0.01)])
def test_the_paired_interval_covers_the_difference(p_better, p_worse):
    """Against simulation: about 95 of 100 intervals hold the true difference."""
    rng, n = np.random.default_rng(0), 300
    draws = rng.multinomial(n, [p_better, p_worse, 1 - p_better - p_worse], size=2000).tolist()
    held = [
        low <= 100 * (p_better - p_worse) <= high
        for low, high in (intervals.paired_interval(b, w, n) for b, w, _ in draws)
    ]
    assert 0.93 <= np.mean(held) <= 0.995


def test_a_gain_counts_the_images_that_only_one_gets_right():
    a, b = np.random.default_rng(0).random((2, 500)) < [[0.8], [0.7]]
    found = intervals.gain(torch.tensor(a), torch.tensor(b))
    assert found.points == pytest.approx(100 * (a.mean() - b.mean()))
    only_a, only_b = (a & ~b).sum(), (b & ~a).sum()
    assert (found.low, found.high) == intervals.paired_interval(only_a, only_b, 500)
    assert found.low < found.points < found.high
    assert str(intervals.gain(torch.tensor([True, True]), torch.tensor([True, False]))).startswith("+50.0 points (")


def test_the_paired_interval_is_narrower_than_that_of_two_samples():
    low, high = intervals.paired_interval(20, 20, 1000)
    assert low == pytest.approx(-high)
    assert high < 1.3  # two independent accuracies of 80 % would be 3.5 points apart by chance


@pytest.mark.parametrize("between", [0.0, 4.0])
def test_the_interval_of_a_mean_covers_it(between):
    """Against simulation: the accuracy varies from draw to draw, and the test images are a sample."""
    rng, n, held = np.random.default_rng(0), 400, 0
    for _ in range(1000):
        difficulty = rng.normal(0, 1, n)  # of the test images, the same for all draws
        top1 = []
        for shift in rng.normal(0, between / 100 / 0.3, 5):  # the density of a normal at its 0.7 quantile is about 0.35
            top1.append(100 * float((difficulty < 0.5244 + shift).mean()))
        low, high = intervals.mean_interval(top1, n)
        held += low <= 70 <= high
    assert held >= 935


def test_the_interval_of_one_is_wilsons_and_of_several_holds_students():
    assert intervals.mean_interval([80.0], 100) == pytest.approx(intervals.wilson_interval(80.0, 100))
    low, high = intervals.mean_interval([60.0, 70.0, 80.0], 10**9)  # no error of the test images
    assert (low, high) == pytest.approx((70 - 24.84, 70 + 24.84), abs=0.01)  # 4.3027 * 10 / sqrt(3)
    assert intervals.mean_interval([0.0, 100.0], 50) == (0.0, 100.0)


def test_an_accuracy_has_wilsons_interval():
    found = intervals.accuracy(torch.tensor([True, True, True, False]))
    assert found.top1 == 75.0
    assert (found.low, found.high) == pytest.approx(intervals.wilson_interval(75.0, 4))
