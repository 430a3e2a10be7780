import re
import shutil
import subprocess

import stages
import torch

from barlow.core import files, machine, provenance
from barlow.training import model


def test_what_is_known_of_the_encoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_weights(files.ENCODER, {"w": torch.zeros(1)}, {"data": "digest", "steps": 872, "version": "1.2"})
    stages.export()
    files.write_json(files.REPORTS / "pretrain.json", {"hardware": "8 x GPU", "processes": 8})
    facts = provenance.facts()
    assert facts["Encoder"]["training images, SHA-256"] == "digest"
    assert facts["Encoder"]["training: steps"] == "872"
    assert facts["Encoder"]["training: hardware"] == "8 x GPU"
    assert facts["models/encoder.onnx"]["SHA-256"] == files.sha256(files.ONNX)
    assert facts["models/encoder.onnx"]["space"] == "0123456789abcdef"
    assert "classes" not in facts["models/encoder.onnx"]
    assert facts["This page"]["hardware"] == machine.hardware()


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
