"""What flows/pages.py makes of the files that the commands leave."""

import json
from pathlib import Path

import pytest

from flows import pages


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("reports").mkdir()
    Path("data").mkdir()


@pytest.mark.parametrize(
    ("line", "result"),
    [
        ("Running stage 'shard':", "ran"),
        ("Stage 'shard' is cached - skipping run, checking out outputs", "cached"),
        ("Stage 'shard' didn't change, skipping", "up to date"),
        ("", "done"),
    ],
)
def test_a_row_tells_ran_from_cached(line, result):
    step = {"name": "shard", "seconds": 1.5, "lines": ["before", line, "after"], "code": 0}
    assert pages.row(step) == {"stage": "shard", "result": result, "seconds": 1.5}


def test_validation_lists_checks_and_the_first_quarantined_paths():
    assert pages.validation() is None
    figures = {"success": False, "observed": 0.5, "bound": 0.99, "severity": "critical"}
    found = {"images": 1200, "accepted": 1100, "quarantined": 100}
    found |= {f"decodable_{key}": value for key, value in figures.items()}
    Path("reports/validate.json").write_text(json.dumps(found))
    rows = [f'"odd | {i}`, name.jpg",empty file' for i in range(100)]
    Path("data/quarantine.csv").write_text("\n".join(["path,reason", *rows]))
    lines = pages.validation().splitlines()
    assert lines[0] == "1,100 of 1,200 images accepted, 100 in quarantine"
    assert "| decodable | **failed** | 0.5 | 0.99 | critical |" in lines
    assert "First 50 of 100 in `data/quarantine.csv`:" in lines
    assert sum(line.startswith("- `odd") for line in lines) == 50


def test_the_decision_has_figures_side_by_side_and_each_check():
    assert pages.decision(None) is None
    text = pages.decision(
        {
            "decision": "refused",
            "reason": "knn: worse",
            "production": "v1",
            "champion": "v1",
            "figures": {"challenger": {"knn_top1": 50.0}, "v1": {"knn_top1": 80.0}},
            "checks": {"knn": {"passed": False, "text": "-30.0 points"}, "size": {"passed": True, "text": "10 bytes"}},
        }
    )
    lines = text.splitlines()
    assert lines[0] == "**Refused**: knn: worse"
    assert "In production: v1 (before: v1)." in lines
    assert "| | challenger | v1 |" in lines
    assert "| knn_top1 | 50 | 80 |" in lines
    assert lines[-2:] == ["- **failed** knn: -30.0 points", "- ok size: 10 bytes"]


def test_the_report_is_a_link_and_its_last_picture_of_the_correlation():
    assert pages.report() is None
    picture = '<img class="c" src="data:image/png;base64,{0}" width="9" alt="{1}">'
    pictures = [
        ("AAAA", "Cross-correlation matrix before"),
        ("BBBB", "Cross-correlation matrix after"),
        ("CCCC", "a cat"),
    ]
    Path("reports/index.html").write_text("\n".join(picture.format(*each) for each in pictures))
    lines = pages.report().splitlines()
    assert lines[0] == f"[reports/index.html]({Path('reports/index.html').resolve().as_uri()}) on the worker's disk"
    assert lines[-1] == "![Cross-correlation matrix after](data:image/png;base64,BBBB)"
    assert "AAAA" not in pages.report()
