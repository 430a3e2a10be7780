import pytest

from barlow.training import steps


@pytest.mark.parametrize(
    ("count", "start"), [(1, "1 step is few"), (12, "12 steps are few"), (499, "499 steps are few")]
)
def test_few_steps_are_warned_of_with_the_remedy(count, start):
    text = steps.warning(count, 6)
    assert text.startswith(f"{start}: ")
    assert text.endswith("; raise pretrain.epochs=6")


def test_enough_steps_are_not():
    assert steps.warning(500, 6) is None
