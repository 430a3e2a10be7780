import math

import numpy as np
import pytest
import torch

from barlow.training import health


def test_effective_rank():
    orthogonal = torch.linalg.qr(torch.randn(50, 8, generator=torch.Generator().manual_seed(0))).Q
    assert health.effective_rank(orthogonal) == pytest.approx(8, rel=1e-3)
    assert health.effective_rank(torch.ones(50, 8)) == pytest.approx(1, rel=1e-3)


def test_spread_is_one_where_even_and_zero_where_collapsed():
    z = torch.randn(8192, 64, generator=torch.Generator().manual_seed(0))
    assert health.spread(z) == pytest.approx(1, abs=0.01)
    assert health.spread(1000 * z.bfloat16()) == pytest.approx(1, abs=0.01)
    assert health.spread(z[:1].expand(100, 64)) == pytest.approx(0, abs=1e-6)
    line = torch.arange(1, 101)[:, None] * z[:1]  # all in one direction, however long
    assert health.spread(line) == pytest.approx(0, abs=1e-6)
    assert 0.01 < health.spread(z + 10) < 0.2


def test_alignment_and_uniformity_of_known_points():
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert health.alignment(x, 5 * x) == pytest.approx(0, abs=1e-12)
    assert health.alignment(x, -x) == pytest.approx(4)
    assert health.uniformity(x) == pytest.approx(-4)  # one pair at squared distance 2
    ring = torch.tensor([[math.cos(t), math.sin(t)] for t in (0, 2, 4)])
    assert health.uniformity(ring) < health.uniformity(torch.tensor([[1.0, 0], [1, 0.1], [1, -0.1]]))


def test_redundancy_is_the_root_mean_square_correlation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 5
    c = np.corrcoef(x.T)
    expected = np.sqrt((c[~np.eye(6, dtype=bool)] ** 2).mean())
    assert health.rms_correlation(torch.tensor(x).float()) == pytest.approx(expected, rel=1e-4)
    assert health.rms_correlation(torch.ones(50, 8)) == 0
    assert health.rms_correlation(torch.tensor(x[:, :1]).float().repeat(1, 4)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("count", "start"), [(1, "1 step is few"), (12, "12 steps are few"), (499, "499 steps are few")]
)
def test_few_steps_are_warned_of_with_the_remedy(count, start):
    text = health.few_steps(count, 6)
    assert text.startswith(f"{start}: ")
    assert text.endswith("; raise pretrain.epochs=6")


def test_enough_steps_are_not():
    assert health.few_steps(500, 6) is None
