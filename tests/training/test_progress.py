import io
import sys
from types import SimpleNamespace

import pytest

from barlow.training.progress import FOLDER, Curves, Progress, describe

ROW = {"loss": 2.0, "invariance": 0.5, "redundancy": 0.1, "lr": 0.3}


def lines(name):
    return (FOLDER / f"plots/metrics/{name}.tsv").read_text().splitlines()


def test_a_resumed_run_has_each_epoch_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = Curves([])
    for loss in (3.0, 2.0, 1.0):  # the third was not in the checkpoint
        first.write(ROW | {"loss": loss})
    second = Curves([ROW | {"loss": 3.0}, ROW | {"loss": 2.0}])
    second.write(ROW | {"loss": 1.5})
    assert lines("loss") == ["step\tloss", "0\t3.0", "1\t2.0", "2\t1.5"]
    assert lines("lr")[1:] == ["0\t0.3", "1\t0.3", "2\t0.3"]


@pytest.fixture
def clock(monkeypatch):
    """The clock that `Progress` reads; `now` is set by hand."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(sys.modules[Progress.__module__], "time", clock)
    return clock


def work(progress, clock, steps):
    """Take some steps of 2 s each, of which 0.5 s are spent waiting for a batch; yield after each."""

    def batches():
        for i in range(steps):
            clock.now += 0.5
            yield i

    for i in progress.waits(batches()):
        clock.now += 1.5
        yield i


def test_a_line_every_ten_seconds(clock, capsys):
    with Progress(4, 10, 3, 8, shown=True) as progress:
        for i in work(progress, clock, 13):
            if progress.due():
                progress.show(ROW | {"loss": float(i)})
    assert capsys.readouterr().out.splitlines() == [
        # 6 steps of 8 images in 12 s; 20 steps are left
        "epoch 1/3  step 10/30  loss 5.0  invariance 0.5000  redundancy 0.100000  lr 0.3000  4 images/s  "
        "data wait 25.0%  0:00:40 left",
        "epoch 2/3  step 16/30  loss 11.0  invariance 0.5000  redundancy 0.100000  lr 0.3000  4 images/s  "
        "data wait 25.0%  0:00:28 left",
    ]


def test_an_epoch_is_measured_from_the_end_of_the_one_before(clock, capsys):
    with Progress(0, 6, 4, 8, shown=True) as progress:
        assert list(work(progress, clock, 6)) == [0, 1, 2, 3, 4, 5]
        row = progress.epoch_figures()
        assert row == {"seconds": 12.0, "samples_per_second": 4.0, "data_wait": 0.25}
        clock.now += 20  # kNN, say: of neither epoch
        progress.end_epoch(ROW | row)
        assert not progress.due()  # the epoch's line counts as one
        for _ in work(progress, clock, 1):
            pass
        assert progress.epoch_figures() == {"seconds": 2.0, "samples_per_second": 4.0, "data_wait": 0.25}
    assert capsys.readouterr().out == (
        "epoch 1/4  loss 2.0  invariance 0.5000  redundancy 0.100000  lr 0.3000  4 images/s  data wait 25.0%\n"
    )


def test_a_finished_epoch_is_in_the_log_at_once(clock, monkeypatch):
    log = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(log))
    with Progress(3, 3, 4, 8, shown=True) as progress:
        progress.end_epoch(ROW | {"samples_per_second": 4.0, "data_wait": 0.0})
        assert log.getvalue().startswith(b"epoch 1/4  loss 2.0")


def test_time_that_a_batch_takes_after_the_last_is_waiting_too(clock):
    def batches():
        yield "a"
        clock.now += 3

    with Progress(0, 1, 1, 8, shown=True) as progress:
        for batch in progress.waits(batches()):
            assert batch == "a"
            clock.now += 1
        assert progress.epoch_figures()["data_wait"] == 0.75


def test_where_nothing_is_shown_it_still_measures(clock, capsys):
    with Progress(0, 10, 1, 8, shown=False) as progress:
        for _ in work(progress, clock, 10):
            assert not progress.due()
        row = progress.epoch_figures()
        progress.end_epoch(ROW | row)
    assert row["samples_per_second"] == 4
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_there_is_a_bar(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(4, 10, 3, 8, shown=True) as progress:
        for _ in work(progress, clock, 6):
            assert progress.due()  # each second
            progress.show(ROW)
        progress.end_epoch(ROW | progress.epoch_figures())
        text = sys.stderr.getvalue()
    assert "| 4/30 [" in text
    assert "| 10/30 [" in sys.stderr.getvalue()
    assert "loss 2.0  invariance 0.5000  redundancy 0.100000  lr 0.3000  4 images/s  data wait 25.0%  0:00:4" in text
    assert capsys.readouterr().out.startswith("epoch 1/3  loss 2.0")
    assert "\n" not in text


def test_a_row_reads_as_a_line():
    line = describe(ROW | {"seconds": 1.0, "samples_per_second": 412.3, "data_wait": 0.0123})
    assert line == ("loss 2.0  invariance 0.5000  redundancy 0.100000  lr 0.3000  412 images/s  data wait 1.2%")
    assert (
        describe(ROW | {"samples_per_second": 412.3, "data_wait": 0.0123, "knn_val_top1": 61.34})
        == line + "  kNN on val 61.3 %"
    )
