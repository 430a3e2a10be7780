import pytest
from stages import HOSTILE, READABLE

from barlow.reporting import pages


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (7, "7"),
        (1234567, "1,234,567"),
        (1234.5678, "1,235"),
        (12.34567, "12.35"),
        (-0.5, "−0.5"),
        (0.000012, "1.2e−05"),
        ("cpu", "cpu"),
    ],
)
def test_figures(value, text):
    assert pages.figure(value) == text


def test_figures_with_more_digits():
    assert pages.figure(0.999999881, 9) == "0.999999881"


def test_names_are_spelled_out():
    assert pages.printable(HOSTILE) == READABLE


def test_a_curve_is_read_from_its_text():
    assert pages.curve("step\tloss\n0\t2.5\n1\t1e-3\n") == [2.5, 0.001]


def test_a_table_is_read_below_its_header(tmp_path):
    (tmp_path / "a.csv").write_text('x,y\n1,"a, b"\n', encoding="utf-8")
    assert pages.read_table(tmp_path / "a.csv") == [["1", "a, b"]]


def test_a_page_is_escaped_and_whole_or_not_there(tmp_path, monkeypatch):
    from jinja2 import DictLoader, UndefinedError

    monkeypatch.setattr(
        pages, "PackageLoader", lambda *_: DictLoader({"a": "<b>{{ name }}</b>{{ shape(0, 1, 1, 1) }}"})
    )
    pages.write(tmp_path / "a.html", "a", {"name": "<script>"})
    assert (tmp_path / "a.html").read_text().startswith("<b>&lt;script&gt;</b>M0 1")
    with pytest.raises(UndefinedError, match="name"):
        pages.write(tmp_path / "b.html", "a", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
