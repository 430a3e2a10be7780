import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from barlow.core import provenance


def test_packages_are_those_that_the_pipeline_runs_on():
    versions = provenance.packages()
    assert torch.__version__.startswith(versions["torch"])
    assert "pytest" not in versions


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository whose one commit holds params.yaml; it is the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "params.yaml").write_text("a: 1")
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "m"]):
        subprocess.run(["git", *command], check=True)
    return tmp_path


@pytest.fixture
def no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))


def test_git_returns_what_it_prints(repository, monkeypatch):
    (repository / "ä b.txt").write_text("x")
    assert provenance.git("ls-files", "-z", "--others") == "ä b.txt\0"
    (repository / "inner").mkdir()
    assert provenance.git("rev-parse", "--show-prefix", project=repository / "inner") == "inner/"
    monkeypatch.chdir("/")
    assert provenance.git("ls-files", project=repository) == "params.yaml"
    inside = {"GIT_DIR": str(repository / ".git")}
    assert provenance.git("ls-tree", "--name-only", "HEAD", environment=inside) == "params.yaml"


def test_git_that_fails_says_why(repository):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        provenance.git("rev-parse", "--verify", "nowhere")
    assert "fatal: " in caught.value.stderr


def test_the_commit_is_that_of_head(repository):
    named = (repository / ".git" / (repository / ".git/HEAD").read_text().split()[1]).read_text().strip()
    assert provenance.commit() == named


def test_without_a_repository_or_without_git_there_is_no_commit(no_repository, monkeypatch):
    assert provenance.commit() is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert provenance.commit() is None
    assert provenance.revision() == "not in a git repository"


def test_a_repository_without_a_commit_has_none(no_repository):
    subprocess.run(["git", "init", "-q"], check=True)
    assert provenance.commit() is None


def test_the_revision_tells_a_changed_checkout(repository):
    assert provenance.revision() == provenance.commit()
    (repository / "params.yaml").write_text("a: 2")
    assert provenance.revision().endswith(", with uncommitted changes in params.yaml")
    assert provenance.revision(["src"]) == provenance.commit()


def test_the_code_of_a_run_is_what_pretraining_imports(tmp_path, monkeypatch):
    """A comment in the service does not change the hash; one in the loss does, and starts another run."""
    package = shutil.copytree(provenance.PACKAGE, tmp_path / "barlow")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    before = provenance.code_hash("pretrain")
    assert provenance.code_hash("pretrain", "evaluate") != before
    others = ("serve", "evaluate", "claims", "cli", "production/gate", "serving/engine", "settings/params")
    for name in others:
        with (package / f"{name}.py").open("a") as source:
            source.write("# a comment\n")
    assert provenance.code_hash("pretrain") == before
    seen = {before}
    changed = ("pretrain", "training/state", "training/loss", "training/distort", "training/checkpoint", "core/images")
    for name in changed:
        with (package / f"{name}.py").open("a") as source:
            source.write("# a comment\n")
        seen.add(provenance.code_hash("pretrain"))
    assert len(seen) == 1 + len(changed)


def test_hardware_names_processors_and_gpus(monkeypatch):
    names = ["NVIDIA A", "NVIDIA B", "NVIDIA A"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    processors, *gpus = provenance.hardware().split(", ")
    count, _, name = processors.partition(" x ")
    assert int(count) == len(os.sched_getaffinity(0))
    assert f": {name}\n" in Path("/proc/cpuinfo").read_text()
    assert gpus == ["2 x NVIDIA A", "1 x NVIDIA B"]
