"""Real processes under torchrun against one: the loss, its gradient, what travels, batch norm and a whole training."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from barlow import distributed, model
from barlow.loss import barlow_twins_loss

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from barlow import distributed, model
from barlow.loss import barlow_twins_loss

torch.set_num_threads(1)
device = distributed.start("cpu")
rank, world = distributed.rank(), distributed.world_size()
results = {}

sent = 0
def counted(collective, argument):
    def call(*tensors, **options):
        global sent
        sent += tensors[argument].nbytes
        return collective(*tensors, **options)
    return call

for name, case in torch.load(sys.argv[1], weights_only=True).items():
    weight = case["weight"].requires_grad_()
    views = [view.chunk(world)[rank] for view in case["views"]]
    originals, sent = (dist.all_reduce, dist.all_gather_into_tensor), 0
    dist.all_reduce, dist.all_gather_into_tensor = counted(originals[0], 0), counted(originals[1], 1)
    loss = barlow_twins_loss(*(view @ weight for view in views), 0.0051)
    loss.total.backward()
    dist.all_reduce, dist.all_gather_into_tensor = originals
    dist.all_reduce(weight.grad)  # DistributedDataParallel's mean
    results[name] = {"gradient": weight.grad / world, "total": loss.total.detach(), "sent": sent}

network = torch.nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6))
network.load_state_dict(torch.load("network.pt", weights_only=True))
network = model.synchronised(network, device)
images = torch.load("images.pt", weights_only=True)
network(images.chunk(world)[rank]).pow(3).mean().backward()
for parameter in network.parameters():
    dist.all_reduce(parameter.grad)
    parameter.grad /= world
results["network"] = {
    "gradients": {name: parameter.grad for name, parameter in network.named_parameters()},
    "state": network.state_dict(),
}

def gather(value):
    values = [None] * world
    torch.distributed.all_gather_object(values, value)
    return values

try:
    barlow_twins_loss(torch.ones(4 + (rank == 1), 8), torch.ones(4 + (rank == 1), 8), 0.1)
except ValueError as error:
    results["unequal"] = gather(str(error))
assert distributed.any_process(rank == 1, False) == [True, False]
if rank == 0:
    torch.save(results, "out.pt")
distributed.stop()
"""


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6)
    built = nn.Sequential(*layers)
    for parameter in built.parameters():
        nn.init.normal_(parameter)
    return built


@pytest.fixture(scope="module")
def cases():
    """Views and a weight to embed them with; the parts of the batch differ in mean and spread."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, (n, dim) in {"dual": (16, 64), "direct": (64, 16)}.items():
        views = [torch.randn(n, 8, generator=generator) for _ in range(2)]
        for i, part in enumerate(views[0].chunk(4)):
            part.mul_(1 + i).add_(i)
        drawn[name] = {"weight": torch.randn(8, dim, generator=generator), "views": views}
    return drawn


@pytest.fixture(scope="module")
def images():
    parts = torch.randn(4, 4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return (parts * torch.arange(1, 5)[:, None, None, None, None] + 1).flatten(0, 1)


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory, cases, images):
    """(how many there were, what they computed)."""
    folder = tmp_path_factory.mktemp("processes")
    for name, content in {"in.pt": cases, "images.pt": images, "network.pt": network().state_dict()}.items():
        torch.save(content, folder / name)
    (folder / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    done = subprocess.run([*launch, "worker.py", "in.pt"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dual", "direct"])
def test_gradient_does_not_depend_on_the_number_of_processes(processes, cases, form):
    weight = cases[form]["weight"].double().requires_grad_()
    expected = barlow_twins_loss(*(view.double() @ weight for view in cases[form]["views"]), 0.0051).total
    expected.backward()
    result = processes[1][form]
    assert result["total"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert (result["gradient"] - weight.grad).norm() / weight.grad.norm() <= 1e-5


@pytest.mark.slow
def test_the_smaller_of_embeddings_and_matrix_travels_once(processes):
    world, results = processes
    vectors = {name: 4 * (2 * 4 + 1) * dim for name, dim in {"dual": 64, "direct": 16}.items()}  # statistics, diagonal
    scalars = 64
    embeddings = 4 * 2 * (16 // world) * 64  # that one process sends
    assert embeddings <= results["dual"]["sent"] <= embeddings + vectors["dual"] + scalars
    matrix = 4 * 16**2
    assert matrix <= results["direct"]["sent"] <= matrix + vectors["direct"] + scalars


@pytest.mark.slow
def test_batch_norm_sees_the_global_batch(processes, images):
    alone = network()
    alone(images).pow(3).mean().backward()
    result = processes[1]["network"]
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(result["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-4)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(result["state"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_unequal_batches_are_refused_on_every_process(processes):
    world, results = processes
    sizes = [5 if rank == 1 else 4 for rank in range(world)]
    wanted = "the batch size is {} here and from 4 to 5 on the processes; it must be the same"
    assert results["unequal"] == [wanted.format(size) for size in sizes]


def test_batch_norm_alone_is_that_of_torch():
    ours, theirs = model.synchronised(network(), torch.device("cpu")), network()
    assert sum(isinstance(module, model.SyncBatchNorm) for module in ours.modules()) == 2
    x = torch.randn(8, 3, 6, 6)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch's SyncBatchNorm is not compared here")
def test_batch_norm_is_that_of_torch_on_a_gpu():
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        x = torch.randn(8, 3, 6, 6, device="cuda")
        cuda = model.synchronised(network().cuda(), torch.device("cuda"))
        torch.testing.assert_close(cuda(x).cpu(), model.synchronised(network(), torch.device("cpu"))(x.cpu()))
    finally:
        torch.distributed.destroy_process_group()


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
    assert distributed.any_process(True, False) == [True, False]
    distributed.require_equal(3, "anything", torch.device("cpu"))


def test_restarts_that_will_fail_are_warned_of(capsys):
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3", "RANK": "0"}
    others = {"RANK": "1"}, {"TORCHELASTIC_MAX_RESTARTS": "0"}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    for fine in others:
        distributed._check_restarts(environment | fine)
    distributed._check_restarts({})
    assert capsys.readouterr().err == ""
    distributed._check_restarts(environment)
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
