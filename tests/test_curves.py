import itertools

import pytest

from barlow import curves

ROW = {"loss": 2.0, "on_diagonal": 0.5, "off_diagonal": 0.1, "lr": 0.3}


def lines(name):
    return (curves.FOLDER / f"plots/metrics/{name}.tsv").read_text().splitlines()


def test_a_resumed_run_has_each_epoch_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = curves.Curves([])
    for loss in (3.0, 2.0, 1.0):  # the third was not in the checkpoint
        first.write(ROW | {"loss": loss})
    second = curves.Curves([ROW | {"loss": 3.0}, ROW | {"loss": 2.0}])
    second.write(ROW | {"loss": 1.5})
    assert lines("loss") == ["step\tloss", "0\t3.0", "1\t2.0", "2\t1.5"]
    assert lines("lr")[1:] == ["0\t0.3", "1\t0.3", "2\t0.3"]


def test_meter_shares_the_time_between_data_and_work(monkeypatch):
    ticks = itertools.count()  # each look at the clock is a second later
    monkeypatch.setattr(curves.time, "perf_counter", lambda: float(next(ticks)))
    meter = curves.Meter(batch_size=10)
    assert list(meter.waits("abc")) == ["a", "b", "c"]
    row = meter.row()  # 1 + 2 * 4 looks since the start, of which 4 pairs around a wait
    assert row == {"seconds": 9.0, "samples_per_second": pytest.approx(30 / 9), "data_wait": pytest.approx(4 / 9)}
    assert meter.row()["samples_per_second"] == 0


def test_a_row_reads_as_a_line():
    line = curves.describe(ROW | {"seconds": 1.0, "samples_per_second": 412.3, "data_wait": 0.0123})
    assert line == ("loss 2.0  on-diagonal 0.5000  off-diagonal 0.100000  lr 0.3000  412 images/s  data wait 1.2%")
