import io
import sys
from types import SimpleNamespace

import pytest

from barlow.core import progress
from barlow.core.progress import Progress, shown


@pytest.fixture
def clock(monkeypatch):
    """The clock that `Progress` reads; `now` is set by hand."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(Progress, "_last", clock.now)
    return clock


def test_a_line_every_ten_seconds(clock, capsys):
    for i in shown(range(25), "embed test", 25):
        clock.now += 1
        assert i < 25
    assert capsys.readouterr().out == "embed test: image 11 of 25\nembed test: image 22 of 25\n"


def test_without_a_total_and_in_chunks(clock, capsys):
    with Progress("ingest", unit="file") as counted:
        for _ in range(3):
            clock.now += 6
            counted.update(64)
    assert capsys.readouterr().out == "ingest: file 128\n"


def test_many_short_ones_are_a_long_wait_too(clock, capsys):
    for split in ("train", "val", "test"):
        for _ in shown(range(2), split):
            clock.now += 3
    assert capsys.readouterr().out == "val: image 2\n"


def test_what_is_quick_says_nothing(clock, capsys):
    assert list(shown("abc", "letters")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(shown(range(7), "fit", 7, "probe")) == [*range(7)]
    assert "fit" in sys.stderr.getvalue()
    assert "0/7" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""
