import dataclasses
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch.profiler import profile
from torchvision import models

from barlow import cli, pretrain
from barlow.core.errors import UserError
from barlow.training import dry_run, state
from barlow.training.loss import barlow_twins_loss

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def described(params):
    """Return what each line says, by its name."""
    return {line[:14].rstrip(): line[14:] for line in dry_run.describe(params).splitlines()}


def gibibytes(text):
    """Return those of a process and those of activations."""
    return [float(number) for number in re.findall(r"[\d.]+(?= GiB| of it)", text)]


def test_parameters_are_those_of_torchvisions_network(project, smoke, change):
    lines = described(change(smoke, "model", arch="resnet18", stem="imagenet", projector=(32, 16)))
    resnet = sum(w.numel() for w in models.resnet18().parameters()) - (512 * 1000 + 1000)  # without its classifier
    assert lines["model"] == f"resnet18, imagenet stem, {resnet:,} parameters"
    assert lines["projector"] == f"32-16, {512 * 32 + 2 * 32 + 32 * 16:,} parameters"
    whole, activations = gibibytes(lines["memory"])
    assert whole - activations > 12 * resnet / 2**30 - 0.01  # weights, gradients and momentum


def test_steps_and_learning_rates(project, smoke, change):
    params = change(smoke, "pretrain", epochs=3, warmup_epochs=1.5, lr_weights=0.8, lr_biases=0.02, final_lr=0.1)
    lines = described(params)
    assert lines["steps"] == "9: 3 epochs of 3, of 64 images each"  # of 200
    warmup = 4  # 1.5 * 3, to the even
    last = 0.2 * (0.1 + 0.9 * (1 + math.cos(math.pi * (8 - warmup) / (9 - warmup))) / 2)
    assert lines["learning rate"] == (
        f"0.2 (weights) and 0.005 (biases) after 1.5 epochs of warm-up, down to {last:.2g} along a cosine"
    )


@pytest.mark.parametrize(("batch_size", "dim", "form"), [(64, 65, "dual"), (64, 64, "direct"), (64, 32, "direct")])
def test_the_form_of_the_loss(project, smoke, change, batch_size, dim, form):
    params = change(change(smoke, "model", projector=(16, dim)), "pretrain", batch_size=batch_size, lambd=0.01)
    assert described(params)["loss"] == f"{form} form, of {batch_size} x {dim} embeddings, lambda 0.01"


def test_processes_share_batch_and_memory(project, smoke, change):
    alone = described(change(smoke, "pretrain", batch_size=200, precision="fp32", processes=None, device="cpu"))
    assert alone["processes"] == "1 on cpu, 200 images each, fp32"
    shared = described(change(smoke, "pretrain", batch_size=200, precision="bf16", processes=4, device="cpu"))
    assert shared["processes"] == "4 on cpu, 50 images each, bf16"
    assert gibibytes(alone["memory"])[1] > 4 * gibibytes(shared["memory"])[1] > 0
    with pytest.raises(UserError, match=r"batch_size=64 is not divisible by 3 processes"):
        dry_run.describe(change(smoke, "pretrain", processes=3))


def test_microbatches_save_activations_alone(project, smoke, change):
    whole = change(smoke, "pretrain", batch_size=200, precision="fp32", device="cpu")
    parts = described(change(whole, "pretrain", microbatch=20))
    assert parts["processes"] == "1 on cpu, 200 images each, 20 images at a time, fp32"
    (memory, activations), (less_memory, less) = gibibytes(described(whole)["memory"]), gibibytes(parts["memory"])
    assert activations / 20 < less + 0.005 < activations / 5  # one view of a tenth of the images, and the projector's
    assert memory - less_memory == pytest.approx(activations - less, abs=0.021)
    same = described(change(whole, "pretrain", microbatch=50, processes=4))  # all that a process has
    assert same["processes"] == "4 on cpu, 50 images each, fp32"
    with pytest.raises(UserError, match=r"microbatch=40 does not divide the 50 images .* set it to 25, or to null$"):
        dry_run.describe(change(whole, "pretrain", microbatch=40, processes=4))


def test_the_optimizer_and_its_memory(project, smoke, change):
    """AdamW holds two values per weight, where the others hold one."""
    wide = change(smoke, "model", projector=(4096, 2048))
    memory = {}
    for name in ("sgd", "adamw"):
        lines = described(change(wide, "pretrain", optimizer=name, momentum=0.8, weight_decay=0.05))
        assert lines["optimizer"] == f"{name}, momentum 0.8, weight decay 0.05"
        memory[name] = gibibytes(lines["memory"])[0]
    weights = sum(int(lines[part].split(", ")[-1].split()[0].replace(",", "")) for part in ("model", "projector"))
    assert memory["adamw"] - memory["sgd"] == pytest.approx(4 * weights / 2**30, abs=0.011)


def test_memory_grows_with_the_batch(project, smoke, change):
    figures = [gibibytes(described(change(smoke, "pretrain", batch_size=n))["memory"]) for n in (50, 100, 200)]
    for less, more in pairwise(figures):
        assert more[1] == pytest.approx(2 * less[1], abs=0.011)
        assert more[0] - less[0] >= more[1] - less[1] - 0.011


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_the_profiler_sees_alive(project, smoke, bf16):
    """What a forward pass has allocated and not freed, of which more samples need more."""
    run = state.Training(smoke, CPU)

    def alive(n):
        with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            views = torch.randn(2, n, 3, smoke.views.size, smoke.views.size)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                z = run.network(*(view.contiguous(memory_format=torch.channels_last) for view in views))
            del views
            loss = barlow_twins_loss(*z, 0.1).total
        total = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
        loss.backward()
        return total

    expected = (alive(16) - alive(8)) / 8
    assert dry_run.measure(run, run.network, smoke.views.size, bf16)[0] == pytest.approx(expected, rel=0.05)


def test_a_dry_run_trains_and_writes_nothing(project, smoke, change, capsys, monkeypatch):
    def train(*_):
        raise AssertionError("it trains")

    monkeypatch.setattr("barlow.pretrain.train", train)
    Path("params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(smoke)))))
    assert cli.main(["pretrain", "--dry-run"]) == 0
    names = [line[:14].rstrip() for line in capsys.readouterr().out.splitlines()]
    first = ["model", "projector", "steps", "warning", "processes", "optimizer"]
    assert names == [*first, "learning rate", "loss", "memory", "time"]
    assert sorted(path.name for path in project.iterdir()) == ["data", "params.yaml"]

    too_large = change(smoke, "pretrain", batch_size=500)
    Path("params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(too_large)))))
    assert cli.main(["pretrain", "--dry-run"]) == 2
    assert "pretrain.batch_size=500 is more than the 200 images" in capsys.readouterr().err


def test_the_headline(project, smoke, change):
    run = state.Training(change(smoke, "model", projector=(80,)), CPU)
    assert dry_run.headline(run, bf16=True) == (
        "200 images, 3 batches of 64 per epoch, 2 epochs, 6 steps on cpu, 1 process(es), bf16, dual loss"
    )
    run = state.Training(change(smoke, "pretrain", microbatch=16), CPU)
    assert ", 16 images at a time, fp32, direct loss" in dry_run.headline(run, bf16=False)


def test_without_shards_it_says_so(tmp_path, monkeypatch, smoke, capsys):
    monkeypatch.chdir(tmp_path)
    wanted = "there is no data/shards/pretrain-*.tar to pretrain on; run `dvc repro shard` first"
    for dry in (True, False):
        with pytest.raises(UserError) as caught:
            pretrain.run(smoke, dry_run=dry)
        assert str(caught.value) == wanted
