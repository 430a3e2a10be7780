import pytest

from barlow import files, summary
from barlow.errors import UserError

METRICS = {
    f"{prefix}{name}": value
    for prefix in ("", "random_")
    for name, value in {
        "linear_top1": 70.12,
        "linear_top1_low": 67.2,
        "linear_top1_high": 72.9,
        "knn_top1": 60.0,
        "knn_top1_low": 57.0,
        "knn_top1_high": 63.0,
        "effective_rank": 31.3,
        "alignment": 0.2,
        "uniformity": -2.5,
    }.items()
}


def test_the_table_shows_the_figures():
    table = summary.table(METRICS | {"random_linear_top1": 28.6})
    assert "70.1 (67.2 to 72.9)" in table
    assert "28.6 (67.2 to 72.9)" in table
    assert "31.30" in table


def test_without_labels_health_alone_is_shown():
    table = summary.table({name: value for name, value in METRICS.items() if "top1" not in name})
    assert "no labels" in table
    assert "effective rank" in table


def test_it_says_where_the_report_lies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"reports/evaluate.json is missing"):
        summary.run()
    files.write_json("reports/evaluate.json", METRICS)
    summary.REPORT.write_text("x")
    summary.run()
    out = capsys.readouterr().out
    assert "reports/index.html" in out
    assert "not there" in out  # the encoder


def test_the_table_has_a_column_an_encoder():
    lines = summary.columns({"challenger": {"a_top1": 50.0, "a_top1_low": 40.0, "a_top1_high": 60.0}, "v1": {"b": 1.5}})
    assert lines.splitlines() == [
        "| | challenger | v1 |",
        "|---|---|---|",
        "| a_top1 | 50 (40.0 to 60.0) |  |",
        "| b |  | 1.5 |",
    ]
