"""The whole pipeline under `dvc repro`, in a copy of the project with the `smoke` preset."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from clones import commit, ran, run, set_param
from PIL import Image

from barlow.core import files
from barlow.encoder.encoder import Encoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(reproduced, tmp_path_factory):
    """A clone in which every stage has run, and whose settings tests may change."""
    return shutil.copytree(reproduced, tmp_path_factory.mktemp("pipeline") / "barlow", symlinks=True)


def python(project, program):
    """Run a program with the project's own code; return what it printed."""
    return run(project, "env", "PYTHONPATH=src", sys.executable, "-c", program)


def test_the_encoder_serves(project, monkeypatch):
    monkeypatch.chdir(project)
    encoder = Encoder()
    picture = next(Path("data/raw/test/bricks").glob("*.jpg"))
    vectors = encoder.embed([picture, Image.open(picture)])
    assert vectors.shape == (2, 512)
    assert (vectors[0] == vectors[1]).all()
    assert files.read_json("reports/export.json")["parity"]["cosine_min"] >= 0.9999
    assert encoder.classes == files.read_json("data/shards/classes.json")


def test_the_metrics_are_complete(project):
    metrics = files.read_json(project / "reports/evaluate.json")
    for encoder in ("pretrained", "random"):
        for kind in ("linear", "knn"):
            accuracy = metrics["encoders"][encoder][kind]
            assert accuracy["low"] <= accuracy["top1"] <= accuracy["high"]
    assert metrics["encoders"]["pretrained"]["health"]["effective_rank"] > 1
    validation = files.read_json(project / "reports/validate.json")
    rows = (project / "data/quarantine.csv").read_text().splitlines()[1:]
    accepted, quarantined = validation["accepted"]["total"], validation["quarantined"]["total"]
    assert quarantined == len(rows) == 4  # the planted defects
    assert accepted + quarantined == validation["images"] == 704


def test_dvc_ignores_nothing_it_should_track(project):
    """After a run git sees no file of the stages but the metrics and the lock."""
    seen = run(project, "git", "status", "--porcelain", "--untracked-files=all")
    for line in seen.splitlines():
        assert not re.search(r" (data|models|reports)/(?!README|source\.json|\w+\.json$)", line), line


def test_again_runs_no_stage(project):
    assert ran(run(project, "dvc", "repro")) == []
    assert run(project, "dvc", "status").strip() == "Data and pipelines are up to date."


@pytest.mark.parametrize(
    ("line", "other", "stages"),
    [
        ("parity_images: 9", "parity_images: 10", {"export", "report"}),
        ("flip: 0.5", "flip: 0.4", {"pretrain", "extract", "finetune", "report"}),
    ],
)
def test_a_param_makes_stale_what_reads_it(project, line, other, stages):
    set_param(project, line, other)
    assert set(json.loads(run(project, "dvc", "status", "--json"))) == stages
    set_param(project, other, line)


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("serving/engine", set()),
        ("production/gate", set()),
        ("settings/params", set()),
        ("reporting/charts", {"report"}),
        ("evaluation/intervals", {"evaluate", "finetune", "export", "report"}),
        ("training/loss", {"pretrain", "extract", "evaluate", "finetune", "export", "report"}),
    ],
)
def test_an_edit_makes_stale_what_imports_it(project, module, stages):
    """And the checkpoints of a run that was interrupted are still those of this run, unless training changed."""

    def code_hash():
        return python(project, "from barlow.core import provenance; print(provenance.code_hash('pretrain'))")

    path, before = project / f"src/barlow/{module}.py", code_hash()
    source = path.read_text()
    path.write_text(source + "# a comment\n")
    assert set(json.loads(run(project, "dvc", "status", "--json"))) == stages
    assert (code_hash() == before) == ("pretrain" not in stages)
    path.write_text(source)


def test_what_editors_and_tools_leave_makes_nothing_stale(project):
    for name in (
        ".loss.py.swp",
        "loss.py~",
        ".#loss.py",
        "loss.py.orig",
        ".DS_Store",
        ".mypy_cache/a",
        "__pycache__/a.pyc",
    ):
        path = project / "src/barlow/training" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert run(project, "dvc", "status").strip() == "Data and pipelines are up to date."


def test_a_new_key_in_promote_runs_nothing(project):
    schema, params = project / "src/barlow/settings/params.py", project / "params.yaml"
    before = [(path, path.read_text()) for path in (schema, params)]
    schema.write_text(schema.read_text().replace("    registry: str\n", "    registry: str\n    hours: Count\n"))
    params.write_text(params.read_text().replace("promote:", "promote:\n  hours: 3\n", 1))
    assert python(project, "from barlow.settings import loading; print(loading.load().promote.hours)").strip() == "3"
    assert run(project, "dvc", "status").strip() == "Data and pipelines are up to date."
    for path, text in before:
        path.write_text(text)


def test_metrics_and_plots_are_shown(project):
    assert "encoders.pretrained.linear.top1" in run(project, "dvc", "metrics", "show")
    assert "confusion" in run(project, "dvc", "plots", "show", "--show-vega", "confusion")
    html = run(project, "dvc", "plots", "show").strip().removeprefix("file://")
    text = Path(html).read_text()
    for name in ("invariance", "gradient_norm", "samples_per_second", "few_labels.csv"):
        assert name in text


@pytest.mark.soak
def test_a_stopped_and_then_killed_pretraining_goes_on_when_the_flow_tries_again(project, tmp_path):
    """It ends with the weights of before, to the bit, so that only the report is written again: it has the time."""
    copy = shutil.copytree(project, tmp_path / "barlow", symlinks=True)
    outs = yaml.safe_load((copy / "dvc.lock").read_text())["stages"]["pretrain"]["outs"]
    [md5] = [out["md5"] for out in outs if out["path"] == str(files.ENCODER)]
    (copy / files.ENCODER).unlink()
    (copy / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()  # or DVC would bring it back without a run
    commit(copy)
    flow = "from flows.retrain import retrain; retrain(retry_seconds=0.1, return_state=True)"
    own = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true", "PREFECT_API_URL": ""}
    command, pipes = [sys.executable, "-c", flow], {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=copy, env=os.environ | own, stderr=subprocess.STDOUT, **pipes) as running:
        lines = []

        def says(pattern):
            for line in running.stdout:
                lines.append(line)
                if re.search(pattern, line):
                    return True
            return False

        def pretraining():
            started = psutil.Process(running.pid).children(recursive=True)
            return [process for process in started if process.cmdline()[-1:] == ["pretrain"]][-1]

        while not any((copy / "models/resume").glob("*/step-*")):
            assert not psutil.wait_procs([psutil.Process(running.pid)], timeout=0.05)[0]
        pretraining().terminate()
        assert says(r"barlow pretrain: stopped at step \d+ of"), "".join(lines)
        assert says("epoch 1/2"), "".join(lines)
        pretraining().kill()
        after = running.communicate(timeout=300)[0]
    assert re.search(r"'pretrain' - going on from step [1-9]\d* of 16", after)
    assert list(dict.fromkeys(ran("".join([*lines, after])))) == ["pretrain", "report"]
    assert files.sha256(copy / files.ENCODER) == files.sha256(project / files.ENCODER)
    assert "Finished in state Promoted" in after


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
