import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from barlow.encoder.encoder import unit
from barlow.production import two_sample

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(seed, n, dim, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, dim)) + shift


def slow_mmd2(x, y):
    """Return eq. 3 of Gretton et al., term by term."""
    pooled = [*x, *y]
    sigma = np.median([np.linalg.norm(a - b) for a, b in itertools.combinations(pooled, 2)])

    def k(a, b):
        return np.exp(-(np.linalg.norm(a - b) ** 2) / (2 * sigma**2))

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 / (m * n) * sum(k(a, b) for a in x for b in y)


@pytest.mark.parametrize("decimals", [9, 1, 0])  # from no ties to many
def test_auc_equals_scikit_learn(decimals):
    x, y = normal(0, 70, 1)[:, 0].round(decimals), normal(1, 40, 1, 0.4)[:, 0].round(decimals)
    assert two_sample.auc(x, y) == pytest.approx(roc_auc_score([0] * 70 + [1] * 40, [*x, *y]))


def pairs_auc(x, y, axis):
    """The share of pairs whose second value is larger; ties count half."""
    below, above = np.expand_dims(x, -1), np.expand_dims(y, -2)
    return ((below < above) + (below == above) / 2).mean(axis=(-1, -2))


def test_auc_interval_equals_scipy_s_bootstrap():
    x, y = normal(0, 60, 1)[:, 0].round(1), normal(1, 40, 1, 0.6)[:, 0].round(1)
    oracle = stats.bootstrap(
        (x, y), pairs_auc, n_resamples=1500, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert two_sample.auc_interval(x, y, np.random.default_rng(0)) == pytest.approx((oracle.low, oracle.high), abs=0.01)


def test_scores_of_one_distribution_tell_nothing_and_of_two_much():
    aucs, covered = [], 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((50, 8)), rng.standard_normal((60, 8))
        scores = two_sample.cross_fitted_scores(x, y, rng)
        low, high = two_sample.auc_interval(*scores, rng)
        aucs.append(two_sample.auc(*scores))
        covered += low <= 0.5 <= high
        assert two_sample.auc_interval(*two_sample.cross_fitted_scores(x, y + 1, rng), rng)[0] > 0.8
    assert covered >= 15
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.03)


def test_scores_are_ranks_in_folds_that_are_balanced():
    x, y = two_sample.cross_fitted_scores(normal(0, 30, 3), normal(1, 43, 3, 9), np.random.default_rng(0))
    wanted = (np.arange(12) + 0.5) / 12  # five folds of six and six
    np.testing.assert_allclose(np.unique(x), wanted[:6])
    np.testing.assert_allclose(np.unique(y), wanted[6:])
    assert len(x) == len(y) == 30


def test_equal_rows_of_a_fold_have_equal_scores():
    kinds = normal(0, 3, 77)  # 77 columns: in a matrix product, the rounding of a row depends on its place
    x, y = (kinds[np.random.default_rng(seed).integers(3, size=175)] for seed in (1, 2))
    scores = two_sample.cross_fitted_scores(x, y, np.random.default_rng(0))
    assert len(np.unique(scores)) <= 5 * 3


def test_mmd2_equals_the_formula():
    x, y = normal(0, 14, 3), normal(1, 9, 3, 0.3)
    mmd2_and_p = two_sample.mmd_test(x, y, 0, np.random.default_rng(0))
    assert mmd2_and_p == (pytest.approx(slow_mmd2(x, y), abs=1e-12), 1)


def test_p_equals_that_of_all_permutations():
    x, y = normal(0, 4, 2), normal(1, 5, 2, 0.7)
    pooled, observed = np.concatenate([x, y]), slow_mmd2(x, y)
    every = []
    for chosen in itertools.combinations(range(9), 4):
        rest = [i for i in range(9) if i not in chosen]
        every.append(slow_mmd2(pooled[list(chosen)], pooled[rest]) >= observed - 1e-12)
    _, p = two_sample.mmd_test(x, y, 20_000, np.random.default_rng(0))
    assert 0.02 < np.mean(every) < 0.5
    assert p == pytest.approx(np.mean(every), abs=0.01)


def test_p_is_uniform_under_the_null_and_small_under_a_shift():
    p = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        p.append(two_sample.mmd_test(rng.standard_normal((20, 4)), rng.standard_normal((30, 4)), 200, rng)[1])
        assert seed >= 10 or two_sample.mmd_test(normal(seed, 20, 4), normal(seed + 99, 30, 4, 1), 200, rng)[1] < 0.01
    assert stats.kstest(p, "uniform").pvalue > 0.05
    assert np.mean(np.array(p) <= 0.05) <= 0.12


def test_copies_of_one_image_are_no_drift():
    rng = np.random.default_rng(0)
    x = unit(np.tile(rng.standard_normal(77, np.float32), (40, 1)).astype(np.float64))
    assert two_sample.auc_interval(*two_sample.cross_fitted_scores(x, x[:30], rng), rng) == (0.5, 0.5)
    assert two_sample.mmd_test(x, x[:30], 100, rng) == (pytest.approx(0, abs=1e-9), 1)


def test_drift_in_a_direction_of_little_variance_is_found_once_whitened():
    def sample(seed, shift):
        rng = np.random.default_rng(seed)
        return rng.standard_normal((150, 20)) * np.logspace(0, -1, 20) + shift * np.eye(20)[-1] * 0.1

    p, white = [], []
    for seed in range(20):
        rng, x, y = np.random.default_rng(seed), sample(seed, 0), sample(seed + 100, 1)
        p.append(two_sample.mmd_test(x, y, 200, rng)[1])
        white.append(two_sample.mmd_test(*two_sample.whitened(x, y), 200, rng)[1])
    assert np.mean(np.array(p) <= 0.05) < 0.3
    assert np.mean(np.array(white) <= 0.05) > 0.9


def test_whitened_samples_give_uniform_p_under_the_null():
    p = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((25, 40)), rng.standard_normal((35, 40))  # fewer rows than dimensions
        p.append(two_sample.mmd_test(*two_sample.whitened(x, y), 200, rng)[1])
    assert stats.kstest(p, "uniform").pvalue > 0.05


def test_whitened_directions_have_one_variance():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((300, 5)) * [1, 2, 3, 4, 5], rng.standard_normal((200, 5)) * [1, 2, 3, 4, 5]
    together = np.concatenate(two_sample.whitened(x, y))
    variance = np.linalg.eigvalsh(np.cov(together.T))
    assert variance.max() / variance.min() < 3  # 25 before
    rank_one = np.outer(rng.standard_normal(50), np.ones(5))
    assert np.isfinite(np.concatenate(two_sample.whitened(rank_one[:20], rank_one[20:]))).all()
