"""The Markdown that flows/pages.py makes of the files that the commands write."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from barlow.core import files
from barlow.core.weights import save_weights
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
    check = {"success": False, "observed": 0.5, "bound": 0.99, "severity": "critical", "unexpected": 100}
    counts = {"accepted": {"total": 1100, "by": {"train": 1100}}, "quarantined": {"total": 100, "by": {"width": 100}}}
    Path("reports/validate.json").write_text(json.dumps({"images": 1200, **counts, "checks": {"decodable": check}}))
    rows = [f'"odd | {i}`, name.jpg",empty file' for i in range(100)]
    Path("data/quarantine.csv").write_text("\n".join(["path,reason", *rows]))
    lines = pages.validation().splitlines()
    assert lines[0] == "1,100 of 1,200 images accepted, 100 in quarantine"
    assert "| decodable | **failed** | 0.5 | 0.99 | critical |" in lines
    assert "First 50 of 100 in `data/quarantine.csv`:" in lines
    assert sum(line.startswith("- `odd") for line in lines) == 50


def test_the_decision_has_figures_side_by_side_and_each_check():
    assert pages.decision(None) is None

    def candidate(top1):
        accuracy = {"top1": top1, "low": top1 - 5, "high": top1 + 5}
        return {"logits": None, "linear": None, "knn": accuracy, "effective_rank": 12.345, "std": 0.5}

    text = pages.decision(
        {
            "decision": "refused",
            "reason": "knn: worse",
            "production": "v1",
            "champion": "v1",
            "figures": {"challenger": candidate(50.0), "v1": candidate(80.0)},
            "checks": {"knn": {"passed": False, "text": "-30.0 points"}, "size": {"passed": True, "text": "10 bytes"}},
        }
    )
    lines = text.splitlines()
    assert lines[0] == "**Refused**: knn: worse"
    assert "In production: v1 (before: v1)." in lines
    assert "| | challenger | v1 |" in lines
    assert "| weighted kNN | 50.0 (45.0 to 55.0) | 80.0 (75.0 to 85.0) |" in lines
    assert "| effective rank | 12.35 | 12.35 |" in lines or "| effective rank | 12.34 | 12.34 |" in lines
    assert not any("linear" in line for line in lines)
    assert lines[-2:] == ["- **failed** knn: -30.0 points", "- ok size: 10 bytes"]


def test_the_report_is_a_link_and_a_picture_of_the_correlation_after_training():
    assert pages.report() is None
    Path("reports/index.html").write_text("x")
    link = f"[reports/index.html]({Path('reports/index.html').resolve().as_uri()}) on the worker's disk"
    assert pages.report() == link
    save_weights(files.CORRELATION, {"before": torch.zeros(2, 2), "after": torch.eye(2)}, {})
    first, *_, last = pages.report().splitlines()
    assert first == link
    title, address = re.fullmatch(r"!\[(.*)\]\(data:image/png;base64,(.*)\)", last).groups()
    assert title == "Cross-correlation matrix at the last step"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address))).convert("RGB"))
    assert [tuple(pixel) for pixel in pixels.reshape(4, 3)] == [(168, 50, 26), *[(255, 255, 255)] * 2, (168, 50, 26)]
