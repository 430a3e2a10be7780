"""Real processes against one: the loss, its gradient, what travels and batch norm."""

import dataclasses
import importlib
import os
import subprocess
import sys
import typing

import numpy as np
import psutil
import pytest
import torch
from services import until
from torch import nn

from barlow.core import files
from barlow.core.errors import UserError
from barlow.core.weights import save_weights
from barlow.settings.params import Ablation
from barlow.training import distributed, model
from barlow.training.loss import ablated_loss

WORLD = 4  # two are in test_pretrain, which trains with them, under torchrun
BATCH_NORM = """
import os
import sys
import torch
import torch.distributed as dist
from torch import nn
from barlow.training import distributed, model
from barlow.training.loss import ablated_loss
from barlow.training.loss import barlow_twins_loss, cross_correlation

def batch_norm(device):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6))
    network.load_state_dict(torch.load("network.pt", weights_only=True))
    network = model.synchronised(network.to(device), device)
    images, world = torch.load("images.pt", weights_only=True), distributed.world_size()
    network(images.chunk(world)[distributed.rank()].to(device)).pow(3).mean().backward()
    for parameter in network.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= world
    return {
        "gradients": {name: parameter.grad.cpu() for name, parameter in network.named_parameters()},
        "state": {name: value.cpu() for name, value in network.state_dict().items()},
        "kinds": [type(module).__module__ for module in network if "BatchNorm" in type(module).__name__],
    }
"""
MICROBATCHES = """
class Twins(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), norm, nn.ReLU())
        self.projector = model.projector(8, (7, 6))

def twins(name):
    torch.manual_seed(2)
    return Twins(nn.LayerNorm(8) if name == "layer norm" else nn.BatchNorm1d(8))

def microbatches(name):
    network = model.synchronised(twins(name), torch.device("cpu"))
    parallel = nn.parallel.DistributedDataParallel(model.Microbatches(network, 2), broadcast_buffers=False)
    images, world = torch.load("images.pt", weights_only=True), distributed.world_size()
    views = [view.chunk(world)[distributed.rank()] for view in (images, images.flip(-1) ** 2)]
    for _ in range(2):  # a second step, after which the gradients have been added up
        loss = ablated_loss(*parallel(*views), 0.1, None).total
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"loss": loss.detach(), "gradients": gradients, "state": network.state_dict()}
"""
WORKER = """
sent = 0
def counted(collective, argument):
    def call(*tensors, **options):
        global sent
        sent += tensors[argument].nbytes
        return collective(*tensors, **options)
    return call

def work(rank):
    global sent
    os.environ["RANK"] = str(rank)
    device = distributed.start("cpu")
    world = distributed.world_size()
    assert distributed.rank() == rank
    results = {}

    for name, case in torch.load(sys.argv[1], weights_only=True).items():
        weight = case["weight"].clone().requires_grad_()
        views = [view.chunk(world)[rank] for view in case["views"]]
        originals, sent = (dist.all_reduce, dist.all_gather_into_tensor), 0
        dist.all_reduce, dist.all_gather_into_tensor = counted(originals[0], 0), counted(originals[1], 1)
        loss = ablated_loss(*(view @ weight for view in views), 0.0051, case["ablate"])
        loss.total.backward()
        dist.all_reduce, dist.all_gather_into_tensor = originals
        c = cross_correlation(*(view @ weight.detach() for view in views))
        dist.all_reduce(weight.grad)  # DistributedDataParallel's mean
        results[name] = {"gradient": weight.grad / world, "total": loss.total.detach(), "sent": sent, "c": c}

    results["network"] = batch_norm(device)
    results["microbatches"] = {name: microbatches(name) for name in ("layer norm", "batch norm")}

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

torch.set_num_threads(1)
world = int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), WORLD_SIZE=str(world))
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # that one, and none of their own
torch.multiprocessing.start_processes(work, nprocs=world, start_method="fork")  # one import of torch for all
"""
GPU_WORKER = """
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
results = batch_norm(distributed.start(sys.argv[1]))
if distributed.rank() == 0:
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
        weight = torch.randn(8, dim, generator=generator)
        for ablate in (None, *typing.get_args(Ablation)):
            drawn[name if ablate is None else f"{name} {ablate}"] = {"weight": weight, "views": views, "ablate": ablate}
    return drawn


@pytest.fixture(scope="module")
def images():
    parts = torch.randn(4, 4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return (parts * torch.arange(1, 5)[:, None, None, None, None] + 1).flatten(0, 1)


@pytest.fixture(scope="module")
def processes(tmp_path_factory, cases, images):
    """What WORLD of them computed."""
    folder = tmp_path_factory.mktemp("processes")
    for name, content in {"in.pt": cases, "images.pt": images, "network.pt": network().state_dict()}.items():
        torch.save(content, folder / name)
    (folder / "worker.py").write_text(BATCH_NORM + MICROBATCHES + WORKER)
    command = [sys.executable, "worker.py", "in.pt", str(WORLD)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("ablate", [None, *typing.get_args(Ablation)])
@pytest.mark.parametrize("form", ["dual", "direct"])
def test_gradient_does_not_depend_on_the_number_of_processes(processes, cases, form, ablate):
    case = form if ablate is None else f"{form} {ablate}"
    weight = cases[case]["weight"].double().requires_grad_()
    expected = ablated_loss(*(view.double() @ weight for view in cases[case]["views"]), 0.0051, ablate).total
    expected.backward()
    result = processes[case]
    assert result["total"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert (result["gradient"] - weight.grad).norm() / weight.grad.norm() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dual", "direct"])
def test_the_matrix_is_that_of_the_global_batch(processes, cases, form):
    """By numpy's corrcoef, over the whole batch; each process knows the whole matrix."""
    z_a, z_b = (view.double() @ cases[form]["weight"].double() for view in cases[form]["views"])
    expected = np.corrcoef(z_a.T, z_b.T)[: z_a.shape[1], z_a.shape[1] :]
    np.testing.assert_allclose(processes[form]["c"], expected, atol=1e-4)


@pytest.mark.slow
def test_the_smaller_of_embeddings_and_matrix_travels_once(processes):
    vectors = {name: 4 * (2 * 4 + 1) * dim for name, dim in {"dual": 64, "direct": 16}.items()}  # statistics, diagonal
    scalars = 64
    embeddings = 4 * 2 * (16 // WORLD) * 64  # that one process sends
    assert embeddings <= processes["dual"]["sent"] <= embeddings + vectors["dual"] + scalars
    matrix = 4 * 16**2
    assert matrix <= processes["direct"]["sent"] <= matrix + vectors["direct"] + scalars


def assert_batch_norm(result, images, kind):
    """The gradients and the state are those of torch's own batch norm in one process, on the whole batch."""
    assert result["kinds"] == [kind] * 2
    alone = network()
    alone(images).pow(3).mean().backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(result["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-4)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(result["state"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_batch_norm_sees_the_global_batch(processes, images):
    assert_batch_norm(processes["network"], images, "barlow.training.model")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs: SyncBatchNorm and NCCL are not tested")
def test_batch_norm_sees_the_global_batch_on_two_gpus(tmp_path, images):
    """A process for each of them. In a world of one torch takes its plain batch norm."""
    for name, content in {"images.pt": images, "network.pt": network().state_dict()}.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "worker.py").write_text(BATCH_NORM + GPU_WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, "worker.py", "cuda"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_batch_norm(result, images, "torch.nn.modules.batchnorm")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer norm", "batch norm"])
def test_microbatches_of_all_processes_have_the_gradient_of_the_whole_batch(processes, images, name):
    """The backbone's batch norm sees a microbatch of each process, all together, the projector's the whole batch."""
    scope = {"nn": nn, "torch": torch, "model": model}
    exec(MICROBATCHES, scope)
    alone = scope["twins"](name)
    # Microbatch i is images 2i and 2i + 1 of each process's 4. The loss does not depend on the order of the batch.
    views = [view.unflatten(0, (WORLD, 2, 2)).transpose(0, 1).flatten(1, 2) for view in (images, images.flip(-1) ** 2)]
    for _ in range(2):
        z = [alone.projector(torch.cat([alone.backbone(part) for part in view])) for view in views]
        loss = ablated_loss(*z, 0.1, None).total
        loss.backward()
    result = processes["microbatches"][name]
    torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
    for parameter, gradient in result["gradients"].items():
        torch.testing.assert_close(gradient, alone.get_parameter(parameter).grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["state"], alone.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_unequal_batches_are_refused_on_every_process(processes):
    sizes = [5 if rank == 1 else 4 for rank in range(WORLD)]
    wanted = "the batch size is {} here and from 4 to 5 on the processes; it must be the same"
    assert processes["unequal"] == [wanted.format(size) for size in sizes]


def test_batch_norm_alone_is_that_of_torch():
    ours, theirs = model.synchronised(network(), torch.device("cpu")), network()
    assert sum(isinstance(module, model.SyncBatchNorm) for module in ours.modules()) == 2
    x = torch.randn(8, 3, 6, 6)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


LAUNCH = [sys.executable, "-c", "from barlow.training import distributed; assert distributed.launch(2, 'cpu')"]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code"), [("--version", 0), ("preset unknown", 2)])
def test_a_command_in_several_processes_ends_as_they_do(arguments, code):
    """Commands that need no torch; those that train are in test_pretrain."""
    done = subprocess.run([*LAUNCH, *arguments.split()], capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    assert done.stdout.count("barlow ") == (2 if code == 0 else 0)
    assert ("barlow preset: preset 'unknown' is not in presets/" in done.stderr) == (code == 2)


@pytest.mark.slow
def test_where_a_process_is_killed_the_command_says_so_and_ends_the_others(tmp_path):
    """They wait for their settings: a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "params.yaml")
    with subprocess.Popen([*LAUNCH, "scan"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as command:
        ranks = psutil.Process(command.pid).children
        try:
            until(lambda: len(ranks()) == 2, 120)
            started = ranks()
            started[1].kill()
            error = command.communicate(timeout=120)[1]
        finally:
            for process in [*ranks(), command] if command.poll() is None else ():
                process.kill()
    assert command.returncode == 1, error
    assert "barlow: process 1 was killed by signal 9\n" in error
    assert "FutureWarning" not in error
    assert not any(child.is_running() for child in started)


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


def test_a_gpu_has_its_index(monkeypatch):
    """Without it, DALI makes the views on the CPU and they enter a network on the GPU."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert distributed.local_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.local_device("cuda").index == 3
    assert chosen == [torch.device("cuda", 0), torch.device("cuda", 3)]
    assert torch.backends.cudnn.deterministic
    assert distributed.local_device("cpu").index is None


@pytest.fixture
def two_gpus(monkeypatch):
    """Let PyTorch see two GPUs, and no process be started; a list of how many would have been."""
    launched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        distributed, "elastic_launch", lambda config, _: lambda *__: launched.append(config.nproc_per_node)
    )
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_SIGNALS_TO_HANDLE"):  # `launch` sets them, for its children
        monkeypatch.setenv(name, "1")
    return launched


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused_before_they_start(two_gpus, device):
    wanted = (
        r"^pretrain\.processes=4 is more than the 2 GPU\(s\) that PyTorch sees here; "
        r"set it to at most 2 or to null, one per GPU, or set pretrain\.device to cpu$"
    )
    with pytest.raises(UserError, match=wanted):
        distributed.launch(4, device)
    assert two_gpus == []
    assert distributed.launch(2, device)
    assert distributed.launch(None, device)
    assert distributed.launch(4, "cpu")
    assert two_gpus == [2, 2, 4]


def test_several_processes_on_gpus_where_there_are_none(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"pretrain\.device=cuda, and PyTorch sees no GPU here"):
        distributed.launch(2, "cuda")
    assert distributed.launch(2, "auto")
    assert two_gpus == [2]


def test_a_process_of_torchrun_that_has_no_gpu_is_refused(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    wanted = (
        r"^LOCAL_RANK=2 of LOCAL_WORLD_SIZE=4 has no GPU: PyTorch sees 2 here; "
        r"start at most 2 processes .*pretrain\.processes, .*--nproc-per-node.*pretrain\.device to cpu$"
    )
    with pytest.raises(UserError, match=wanted):
        distributed.local_device()
    assert distributed.local_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.local_device() == torch.device("cuda", 1)


@pytest.mark.parametrize("stage", ["extract", "finetune"])
def test_stages_after_pretraining_work_on_that_device(project, smoke, monkeypatch, stage):
    """Up to where a GPU would be touched: the device that the stage asks for is the one that it uses."""

    class Asked(Exception):
        pass

    def refuse(self, device, *_, **__):
        raise Asked(device)

    monkeypatch.setattr(distributed, "local_device", lambda device="auto": torch.device("cuda", 1))
    monkeypatch.setattr(nn.Module, "to", refuse)
    encoder = model.FrozenEncoder(smoke.model, smoke.views)
    identity = {"model": dataclasses.asdict(smoke.model), "views": dataclasses.asdict(smoke.views)}
    save_weights(files.ENCODER, encoder.state_dict(), identity)
    with pytest.raises(Asked, match="cuda:1"):
        importlib.import_module(f"barlow.{stage}").run(smoke)
