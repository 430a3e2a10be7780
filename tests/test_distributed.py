"""Two real processes under torchrun against one, in exact terms: the loss, its gradient and a whole training."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from barlow import distributed
from barlow.loss import barlow_twins_loss

WORKER = """
import sys
import torch
import torch.distributed as dist
from barlow import distributed
from barlow.loss import barlow_twins_loss

torch.set_num_threads(1)
device = distributed.start("cpu")
rank, world = distributed.rank(), distributed.world_size()
saved = torch.load(sys.argv[1], weights_only=True)
weight = saved["weight"].requires_grad_()
views = [view.chunk(world)[rank] for view in saved["views"]]
loss = barlow_twins_loss(*(view @ weight for view in views), 0.0051)
loss.total.backward()
dist.all_reduce(weight.grad)  # DistributedDataParallel's mean
assert distributed.gather_objects(rank) == list(range(world))
assert distributed.any_process(rank == 1, device) and not distributed.any_process(False, device)
if rank == 0:
    torch.save({"gradient": weight.grad / world, "total": loss.total.detach()}, sys.argv[2])
distributed.stop()
"""


def torchrun(*arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("n", "dim"), [(16, 64), (64, 16)], ids=["dual", "direct"])
def test_gradient_of_two_processes_is_that_of_one(tmp_path, n, dim):
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(n, 8, generator=generator) for _ in range(2)]
    views[0][: n // 2] += 3  # so that the halves' statistics differ
    weight = torch.randn(8, dim, generator=generator)
    torch.save({"weight": weight, "views": views}, tmp_path / "in.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun("worker.py", "in.pt", "out.pt", cwd=tmp_path)
    result = torch.load(tmp_path / "out.pt", weights_only=True)

    weight = weight.double().requires_grad_()
    expected = barlow_twins_loss(*(view.double() @ weight for view in views), 0.0051).total
    expected.backward()
    assert result["total"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert (result["gradient"] - weight.grad).norm() / weight.grad.norm() < 1e-5


def write_params(params):
    plain = json.loads(json.dumps(dataclasses.asdict(params)))
    Path("params.yaml").write_text(yaml.safe_dump(plain))


@pytest.mark.slow
def test_pretraining_starts_its_own_processes(project, smoke, change):
    params = change(smoke, "pretrain", processes=2, epochs=1)
    write_params(params)
    command = [sys.executable, "-m", "barlow.cli", "pretrain"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout
    assert done.stdout.count("epoch 1/1") == 1
    assert (project / "models/encoder.safetensors").exists()

    write_params(change(params, "pretrain", batch_size=63))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "pretrain.batch_size=63 is not divisible by 2 processes; use a multiple" in done.stderr


def test_one_process_needs_no_group():
    x = torch.ones(3, requires_grad=True)
    assert distributed.all_reduce(x) is x
    assert distributed.all_gather(x) is x
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.any_process(True, torch.device("cpu"))
