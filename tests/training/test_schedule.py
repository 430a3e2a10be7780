import math

import pytest

from barlow.training.schedule import warmup_cosine


def official(step, total, warmup, base):
    """adjust_learning_rate of facebookresearch/barlowtwins, in steps; its final rate is base * 0.001."""
    if step < warmup:
        return base * step / warmup
    step, total = step - warmup, total - warmup
    q = 0.5 * (1 + math.cos(math.pi * step / total))
    return base * q + base * 0.001 * (1 - q)


@pytest.mark.parametrize("step", [0, 1, 9, 10, 11, 55, 99, 100])
def test_equals_the_official_code(step):
    assert warmup_cosine(step, 100, 10, 0.8, 0.0008) == pytest.approx(official(step, 100, 10, 0.8))


def test_endpoints():
    assert warmup_cosine(0, 100, 10, 2.0, 0.1) == 0
    assert warmup_cosine(10, 100, 10, 2.0, 0.1) == 2.0
    assert warmup_cosine(55, 100, 10, 2.0, 0.1) == pytest.approx(1.05)
    assert warmup_cosine(100, 100, 10, 2.0, 0.1) == pytest.approx(0.1)


def test_without_warmup_it_starts_at_the_base():
    assert warmup_cosine(0, 10, 0, 2.0, 0.1) == 2.0


def test_warmup_may_last_to_the_end():
    assert warmup_cosine(9, 10, 10, 2.0, 0.1) == pytest.approx(1.8)
