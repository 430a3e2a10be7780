"""The whole pipeline under `dvc repro`, in a copy of the project with the `smoke` preset."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from barlow import files
from barlow.cli import STAGES
from barlow.encoder import Encoder

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(project, *command, code=0):
    """Run a command of the virtual environment in the project; return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=project, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def ran(output):
    return re.findall(r"Running stage '(\w+)'", output)


def set_param(project, line, other):
    path = project / "params.yaml"
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, other))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A clone of what git would commit now, with the smoke preset merged in."""
    project = tmp_path_factory.mktemp("pipeline") / "barlow"
    listed = run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").split("\n")
    for name in filter(None, listed):
        if (ROOT / name).exists() and name != "dvc.lock":
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    run(project, "git", "init", "--quiet")
    run(project, "git", "add", "--all")
    run(project, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "clone")
    run(project, "barlow", "preset", "smoke")
    return project


@pytest.fixture(scope="module")
def reproduced(project):
    run(project, "barlow", "scan")
    assert ran(run(project, "dvc", "repro")) == list(STAGES)
    return project


def test_the_encoder_serves(reproduced, monkeypatch):
    monkeypatch.chdir(reproduced)
    encoder = Encoder()
    picture = next(Path("data/raw/test/bricks").glob("*.jpg"))
    vectors = encoder.embed([picture, Image.open(picture)])
    assert vectors.shape == (2, 512)
    assert (vectors[0] == vectors[1]).all()
    assert files.read_json("reports/export.json")["parity_cosine_min"] >= 0.9999
    assert encoder.classes == files.read_json("data/shards/classes.json")


def test_the_metrics_are_complete(reproduced):
    metrics = files.read_json(reproduced / "reports/evaluate.json")
    for name in ("linear_top1", "knn_top1", "random_linear_top1", "random_knn_top1"):
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
    assert metrics["effective_rank"] > 1
    validation = files.read_json(reproduced / "reports/validation.json")
    rows = (reproduced / "data/quarantine.csv").read_text().splitlines()[1:]
    assert validation["quarantined"] == len(rows) == 4  # the planted defects
    assert validation["accepted"] + validation["quarantined"] == validation["images"] == 704


def test_dvc_ignores_nothing_it_should_track(reproduced):
    """After a run git sees no file of the stages but the metrics and the lock."""
    seen = run(reproduced, "git", "status", "--porcelain", "--untracked-files=all")
    for line in seen.splitlines():
        assert not re.search(r" (data|models|reports)/(?!README|source\.json|\w+\.json$)", line), line


def test_again_runs_no_stage(reproduced):
    assert ran(run(reproduced, "dvc", "repro")) == []
    assert run(reproduced, "dvc", "status").strip() == "Data and pipelines are up to date."


def test_an_export_param_runs_export_and_report_alone(reproduced):
    set_param(reproduced, "parity_images: 9", "parity_images: 10")
    assert ran(run(reproduced, "dvc", "repro")) == ["export", "report"]


def test_a_views_param_runs_from_pretrain(reproduced):
    set_param(reproduced, "flip: 0.5", "flip: 0.4")
    assert ran(run(reproduced, "dvc", "repro")) == ["pretrain", "evaluate", "export", "report"]


def test_metrics_and_plots_are_shown(reproduced):
    assert "linear_top1" in run(reproduced, "dvc", "metrics", "show")
    assert "confusion" in run(reproduced, "dvc", "plots", "show", "--show-vega", "confusion")
    html = run(reproduced, "dvc", "plots", "show").strip().removeprefix("file://")
    assert "on_diagonal" in Path(html).read_text()


def descendants(pid):
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            yield int(child)
            yield from descendants(child)


def test_a_stopped_pretraining_goes_on(reproduced, tmp_path):
    copy = tmp_path / "barlow"
    shutil.copytree(reproduced, copy, symlinks=True)
    set_param(copy, "  epochs: 2\n", "  epochs: 12\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command, pipes = ["dvc", "repro", "--single-item", "pretrain"], {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=copy, env=os.environ | {"PATH": path}, stderr=subprocess.STDOUT, **pipes) as dvc:
        assert any(line.startswith("epoch 2/12") for line in dvc.stdout)
        stages = [
            pid for pid in descendants(dvc.pid) if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"pretrain\0")
        ]
        os.kill(stages[-1], signal.SIGTERM)
        after = dvc.communicate(timeout=60)[0]
    assert dvc.returncode == 255
    step = re.search(r"stopped at step (\d+) of", after)[1]
    assert f"going on from step {step} of" in run(copy, *command)


def test_data_that_fails_validation_stops_the_pipeline(project, tmp_path):
    copy = tmp_path / "barlow"
    shutil.copytree(project, copy, symlinks=True, ignore=shutil.ignore_patterns("shards", "cache"))
    source = copy / "pictures"
    source.mkdir()
    for i in range(30):
        (source / f"{i}.jpg").write_bytes(b"not an image")
    set_param(copy, "source: synthetic", "source: pictures")
    out = run(copy, "dvc", "repro", "validate", code=255)
    assert "decodable" in out
    assert "0.jpg" in out
    assert "exited with 3" in out
    assert not (copy / "data/accepted.parquet").exists()
