from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

from barlow.advice import speed
from barlow.core import webdataset

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clocks(monkeypatch):
    """`clocks(walls, works)` makes steps take these seconds, by the clock and of work."""

    def clocks(walls, works):
        readings = {"perf_counter": accumulate([0.0, *walls]), "process_time": accumulate([0.0, *works])}
        monkeypatch.setattr(speed, "time", SimpleNamespace(**{name: each.__next__ for name, each in readings.items()}))

    return clocks


def test_it_is_the_fastest_step_after_the_first_ones(project, smoke, clocks):
    clocks([9.0, 0.1, 0.1, 2.0, 1.6, 1.8], [9.0] * 6)  # the first three warm up
    tars = webdataset.tars("pretrain")
    assert speed.seconds_per_image(smoke, tars) == pytest.approx(1.6 / smoke.pretrain.batch_size)


def test_what_else_runs_on_a_processor_is_not_counted(project, smoke, clocks):
    """A thread that worked for half a second was kept waiting for the rest."""
    clocks([5.0] * 6, [0.5] * 6)
    wanted = speed.IDLE * 0.5 / torch.get_num_threads() / smoke.pretrain.batch_size
    assert speed.seconds_per_image(smoke, webdataset.tars("pretrain")) == pytest.approx(wanted)


@pytest.mark.parametrize(("seconds", "steps"), [(0.5, 10), (2.0, 6), (8.0, 4), (30.0, 4), (0.01, 53)])
def test_slow_steps_are_measured_fewer_times(clocks, seconds, steps):
    """Three to warm up; then three seconds of them, at least three and at most fifty, and no more after 20 seconds."""
    clocks([seconds] * 60, [seconds] * 60)
    taken = []
    assert len(list(speed._timed(SimpleNamespace(views=["a", "b"]), taken))) == len(taken) == steps


def test_a_sample_smaller_than_a_batch_is_used_several_times(tmp_path, monkeypatch, small_shards, smoke, change):
    monkeypatch.chdir(tmp_path)
    few = list(webdataset.read(webdataset.tars("val", small_shards)))[:5]
    webdataset.write(tmp_path / "few.tar", few)
    assert speed.seconds_per_image(change(smoke, "pretrain", batch_size=12), [tmp_path / "few.tar"]) > 0
    assert not (tmp_path / "models").exists()


def test_the_machine_has_a_name(smoke, change):
    named = speed.hardware(change(smoke, "pretrain", device="cpu", precision="bf16"))
    assert named.endswith(", bf16")
    assert " x " in named
    assert speed.kind(change(smoke, "pretrain", device="cpu")) == "cpu"
