import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from barlow import checkpoint, files, model, pretrain, shards
from barlow.errors import Interrupted, UserError


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(params):
    pretrain.run(params)
    return files.ENCODER.read_bytes(), files.read_json("reports/pretrain.json")


def stop_after(monkeypatch, steps):
    """Send this process SIGTERM in the middle of step number `steps`."""
    record = pretrain.Training.record

    def recorded(self, *arguments):
        record(self, *arguments)
        if self.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(pretrain.Training, "record", recorded)


def test_it_learns_and_writes_what_later_stages_read(project, smoke, change):
    _, report = run(change(smoke, "pretrain", epochs=3))
    assert report["epochs"] == 3
    seconds = [float(line.split("\t")[1]) for line in open_lines("reports/pretrain/plots/metrics/seconds.tsv")[1:]]
    assert report["seconds"] == pytest.approx(sum(seconds))
    curve = [float(line.split("\t")[1]) for line in open_lines("reports/pretrain/plots/metrics/loss.tsv")[1:]]
    assert len(curve) == 3
    assert curve[-1] < curve[0]
    assert curve[-1] == pytest.approx(report["loss"])
    loaded, metadata = model.load_encoder()
    assert metadata["steps"] == 9
    assert metadata["data"] == shards.digest(shards.tars("pretrain"))
    assert loaded(torch.zeros(1, 28, 28, 3, dtype=torch.uint8)).shape == (1, 512)
    corners, _ = model.load_weights(files.CORRELATION)
    assert {name: corner.shape for name, corner in corners.items()} == {"before": (64, 64), "after": (64, 64)}
    assert corners["after"].diagonal().mean() > corners["before"].diagonal().mean()
    assert list(pretrain.RESUME.iterdir()) == []


def open_lines(path):
    return Path(path).read_text().splitlines()


def test_same_seed_same_weights(project, smoke, change):
    params = change(smoke, "pretrain", epochs=1)
    first, _ = run(params)
    second, _ = run(params)
    third, _ = run(change(params, "pretrain", seed=1))
    assert first == second
    assert first != third


@pytest.mark.parametrize("steps", [1, 3, 4])  # in the first epoch, at its end, in the second
def test_stopped_and_run_again_equals_an_undisturbed_run(project, smoke, monkeypatch, capsys, steps):
    expected, expected_report = run(smoke)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Interrupted, match=f"stopped at step {steps} of 6"):
            pretrain.run(smoke)
    encoder, report = run(smoke)
    assert f"going on from step {steps} of 6" in capsys.readouterr().out
    assert encoder == expected
    assert report["loss"] == expected_report["loss"]
    assert len(open_lines("reports/pretrain/plots/metrics/loss.tsv")) == 3


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(project, smoke, change, monkeypatch, capsys):
    """kill -9 after a checkpoint: nothing but the file is left, and it is enough."""
    expected, _ = run(smoke)
    child = """
import json, os, signal, torch
from pathlib import Path
torch.set_num_threads(1)
from barlow import checkpoint, params, pretrain
save = checkpoint.save
def saved(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save = saved
pretrain.run(params.build(params.Params, json.loads(Path("params.json").read_text()), "params"))
"""
    at_once = change(smoke, "pretrain", checkpoint_seconds=0)  # at every step, and not part of the fingerprint
    Path("params.json").write_text(json.dumps(dataclasses.asdict(at_once)))
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    encoder, _ = run(smoke)
    assert "going on from step 1 of 6" in capsys.readouterr().out
    assert encoder == expected


def test_a_checkpoint_of_other_params_is_not_resumed(project, smoke, change, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            pretrain.run(smoke)
    pretrain.run(change(smoke, "pretrain", epochs=1, lambd=0.1))
    captured = capsys.readouterr()
    assert "other params, data or code" in captured.err
    assert "going on" not in captured.out


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(project, smoke, change):
    with pytest.raises(UserError, match=r"not finite by step .* lower pretrain.lr_weights=1e\+30"):
        pretrain.run(change(smoke, "pretrain", lr_weights=1e30, lr_biases=1e30, warmup_epochs=0))
    assert checkpoint.latest(pretrain.RESUME, "any") is None
    assert not files.ENCODER.exists()


def test_fewer_images_than_a_batch(project, smoke, change):
    with pytest.raises(UserError, match=r"pretrain.batch_size=500 is more than the 200 images"):
        pretrain.run(change(smoke, "pretrain", batch_size=500))


def test_no_gpu_is_said(project, smoke, change):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"pretrain.device=cuda"):
        pretrain.run(change(smoke, "pretrain", device="cuda"))


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pretrain.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_bf16_is_as_asked():
    assert pretrain.computes_bf16("bf16", torch.device("cpu"))
    assert not pretrain.computes_bf16("fp32", torch.device("cpu"))
