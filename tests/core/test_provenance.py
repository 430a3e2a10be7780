import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

from barlow.core import provenance


def test_packages_are_those_that_the_pipeline_runs_on():
    versions = provenance.packages()
    assert torch.__version__.startswith(versions["torch"])
    assert "pytest" not in versions


def test_the_revision_tells_a_changed_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.revision() == "not in a git repository"
    (tmp_path / "params.yaml").write_text("a: 1")
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "m"]):
        subprocess.run(["git", *command], check=True)
    assert re.fullmatch("[0-9a-f]{40}", provenance.revision())
    (tmp_path / "params.yaml").write_text("a: 2")
    assert provenance.revision().endswith(", with uncommitted changes in params.yaml")
    assert re.fullmatch("[0-9a-f]{40}", provenance.revision(["src"]))


def test_the_code_of_a_run_is_what_pretraining_imports(tmp_path, monkeypatch):
    """A comment in the service leaves a run's checkpoints what they are; one in the loss makes it another run."""
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
