import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from barlow.core import files, provenance
from barlow.core.errors import Interrupted, UserError
from barlow.experiments import runs


def git(*arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with dvc.yaml, dvc.lock and a source file, all committed."""
    monkeypatch.chdir(tmp_path)
    stages = {
        "pretrain": {"deps": ["data/shards", "src"], "params": ["model", "pretrain.seed"]},
        "extract": {"deps": ["src", "models/encoder"]},
        "evaluate": {"deps": ["src", "data/features"], "params": ["evaluate", "extract.baselines"]},
        "report": {"deps": ["src"], "params": ["report"]},
    }
    lock = {"stages": {"shard": {"outs": [{"path": "data/shards", "md5": "abc.dir"}]}}}
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").write_text("a")
    for name, content in {"dvc.yaml": {"stages": stages}, "dvc.lock": lock}.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "test")
    return tmp_path


def test_inputs_are_code_data_and_sections(repository):
    inputs = runs.inputs()
    assert re.fullmatch("[0-9a-f]{64}", inputs.pop("code"))
    assert inputs == {"sections": ["evaluate", "extract", "model", "pretrain"], "shards": "abc.dir"}


def test_the_code_is_what_the_stages_of_an_experiment_import(repository, monkeypatch):
    """A change in one of their modules makes other experiments; one in the service or the report does not."""
    package = shutil.copytree(provenance.PACKAGE, repository / "barlow")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    before = runs.inputs()["code"]
    for name in ("serving/engine", "reporting/charts", "report", "finetune", "claims", "experiments/runs"):
        with (package / f"{name}.py").open("a") as source:
            source.write("# a comment\n")
    assert runs.inputs()["code"] == before
    hashes = {before}
    for name in ("pretrain", "extract", "evaluate", "training/loss", "evaluation/probe", "core/webdataset"):
        with (package / f"{name}.py").open("a") as source:
            source.write("# a comment\n")
        hashes.add(runs.inputs()["code"])
    assert len(hashes) == 7


def test_the_project_itself_has_inputs(request, monkeypatch):
    """Its stages depend on folders of code, and its shards on one folder."""
    monkeypatch.chdir(request.config.rootpath)
    inputs = runs.inputs()
    assert inputs["sections"] == ["evaluate", "extract", "model", "pretrain", "views"]
    assert inputs["shards"].endswith(".dir")


def test_a_project_without_dvc_lock_in_git_has_none(repository):
    git("rm", "--cached", "--quiet", "dvc.lock")
    with pytest.raises(UserError, match=r"git add dvc\.lock"):
        runs.inputs()


def test_results_are_read_from_git(repository):
    """An experiment is a commit that a reference names, whatever it was made from."""
    for number, name in enumerate(["first", "second"]):
        files.write_json("reports/evaluate.json", {"linear_top1": number})
        git("add", "reports")
        git("commit", "--quiet", "-m", name)
        git("update-ref", f"refs/exps/{number}a/bcdef/{name}", "HEAD")
    git("reset", "--hard", "--quiet", "HEAD~2")
    finished = runs.finished()
    assert set(finished) == {"first", "second"}
    for number, name in enumerate(["first", "second"]):
        assert runs.read(finished[name], "reports/evaluate.json") == {"linear_top1": number}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "k=null"),
        ([512, 512, 32], "k=[512, 512, 32]"),
        ("stop-gradient", "k=stop-gradient"),
        (1e-5, "k=0.00001"),
        (0.25, "k=0.25"),
        (100_000, "k=100000"),
        (True, "k=true"),
    ],
)
def test_values_as_dvc_takes_them(value, text):
    assert runs.assignment("k", value) == text


FAKE = """
import os, subprocess, sys, time
from pathlib import Path
project = Path(os.environ["PYTHONPATH"])
if "cache" in sys.argv:
    sys.exit(print(project / "cache"))
name = sys.argv[sys.argv.index("--name") + 1]
(project / f"{name}.seen").write_text(Path("src/a.py").read_text())
tries = project / f"{name}.tries"
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if name == "slow":
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (project / "child").write_text(str(child.pid))
    os.kill(int(os.environ["TESTED"]), 15)
    child.wait()
if name == "busy" and len(tries.read_text()) < 3 or name == "never":
    sys.exit("ERROR: Unable to acquire lock")
if name == "fails":
    sys.exit("barlow pretrain: the loss is not finite\\nERROR: failed to run: barlow pretrain, exited with 2")
subprocess.run(["git", "update-ref", f"refs/exps/aa/bb/{name}", "HEAD"], check=True)
"""


@pytest.fixture
def fake(repository, monkeypatch):
    """A script in place of DVC. The experiment's name decides what the script does."""
    (repository / "dvc.py").write_text(FAKE)
    monkeypatch.setattr(runs, "SECONDS", 0)
    environment = os.environ | {"PYTHONPATH": str(repository), "TESTED": str(os.getpid())}
    monkeypatch.setattr(runs, "_environment", lambda: environment)


def test_a_stage_that_fails_is_a_result_and_a_busy_dvc_is_asked_again(fake):
    outcomes = dict(runs.run({"busy": {}, "fails": {}, "fine": {}}, 2))
    assert outcomes == {"busy": None, "fails": "barlow pretrain: the loss is not finite", "fine": None}
    assert set(runs.finished()) == {"busy", "fine"}
    assert [len(Path(f"{name}.tries").read_text()) for name in ("busy", "fails", "fine")] == [3, 1, 1]


def test_they_start_from_the_project_as_it_was_and_leave_it_alone(fake, repository):
    head = git("rev-parse", "HEAD")
    (repository / "src/a.py").write_text("uncommitted")
    for name, _ in runs.run({"first": {}, "second": {}}, 1):
        (repository / "src/a.py").write_text(f"edited after {name}")
    seen = {name: (repository / f"{name}.seen").read_text() for name in ("first", "second")}
    assert seen == {"first": "uncommitted", "second": "uncommitted"}
    assert (git("rev-parse", "HEAD"), git("diff", "--name-only")) == (head, "src/a.py")
    assert (repository / "src/a.py").read_text() == "edited after second"
    assert list((repository / ".dvc/tmp").iterdir()) == []


def test_a_dvc_that_cannot_run_is_an_error(fake):
    with pytest.raises(UserError, match="DVC cannot run experiment never: ERROR: Unable to acquire lock"):
        list(runs.run({"never": {}}, 1))


def test_a_signal_ends_what_runs_and_starts_nothing_more(fake, repository):
    with pytest.raises(Interrupted, match="run again to go on"):
        list(runs.run({"fine": {}, "slow": {}, "later": {}}, 1))
    child = int((repository / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert set(runs.finished()) == {"fine"}
    assert not (repository / "later.tries").exists()


def test_stages_are_those_of_this_python():
    environment = runs._environment()
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert environment["PYTHONPATH"] == "src"
