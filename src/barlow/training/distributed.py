"""Processes, and differentiable collectives between them. With one process, no collective costs anything.

Every process computes the same global loss. The backward pass of a collective sums the gradients of all processes. So
each process holds world_size times its part of the global gradient, and the mean that DistributedDataParallel takes is
exactly the gradient of one process on the whole batch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from barlow.core import files
from barlow.core.errors import Interrupted, UserError


def start(device: str) -> torch.device:
    """Join the process group, where torchrun started several processes, and return this process's device.

    Raises:
        UserError: there is no GPU and `device` is cuda, or there are fewer GPUs than processes.
    """
    local = local_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        _check_restarts(os.environ)
        dist.init_process_group("cpu:gloo,cuda:nccl" if local.type == "cuda" else "gloo")
    return local


def local_device(device: str = "auto") -> torch.device:
    """Return this process's device: the CPU, or a GPU with its index (without an index DALI would work on the CPU).

    Raises:
        UserError: there is no GPU and `device` is cuda, or there are fewer GPUs than processes.
    """
    if _kind(device) == "cpu":
        return torch.device("cpu")
    number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= gpus:
        raise UserError(
            f"LOCAL_RANK={number} of LOCAL_WORLD_SIZE={os.environ.get('LOCAL_WORLD_SIZE', 1)} has no GPU: PyTorch sees "
            f"{gpus} here; start at most {gpus} processes on this machine (pretrain.processes, or torchrun's "
            f"--nproc-per-node), or set pretrain.device to cpu"
        )
    local = torch.device("cuda", number)
    torch.cuda.set_device(local)
    torch.backends.cudnn.deterministic = True  # a resumed run is to end with the same weights
    return local


def _kind(device: str) -> str:
    """Return cpu or cuda; raise UserError where `device` is cuda and there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("pretrain.device=cuda, and PyTorch sees no GPU here; set it to cpu or auto")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _check_restarts(environment: Mapping[str, str]) -> None:
    """Warn where torchrun's restarts will fail: restarted processes would read outdated addresses from its store.

    https://github.com/pytorch/pytorch/issues/135712
    """
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0)) and environment.get("RANK") == "0":
        print("warning: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or torchrun's restarts fail", file=sys.stderr)


def launch(processes: int | None, device: str) -> bool:
    """Run this command again in several processes and wait for them; return False where this one process is enough.

    Args:
        processes: how many; None: one per GPU, or one where there is none.
        device: cpu, cuda or auto.

    Raises:
        UserError: there is no GPU and `device` is cuda, or there are fewer GPUs than processes.
        SystemExit: one failed; carries its exit code.
        Interrupted: a signal came and was passed on to the processes.
    """
    processes = processes or default_processes(device)
    if processes == 1 or "WORLD_SIZE" in os.environ:
        return False
    if _kind(device) == "cuda" and processes > (gpus := torch.cuda.device_count()):
        raise UserError(
            f"pretrain.processes={processes} is more than the {gpus} GPU(s) that PyTorch sees here; set it to at most "
            f"{gpus} or to null, one per GPU, or set pretrain.device to cpu"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(files.cpus() // processes, 1)))
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # passes them on
    config = LaunchConfig(
        1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="barlow", max_restarts=0
    )
    try:
        elastic_launch(config, sys.executable)("-m", "barlow.cli", *sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"barlow: process {rank} was killed by signal {-failure.exitcode}", file=sys.stderr)
        raise SystemExit(max(failure.exitcode, 1)) from None
    except SignalException as error:
        raise Interrupted(f"stopped by {error.sigval.name}; run again to go on from the last checkpoint") from None
    return True


def default_processes(device: str) -> int:
    """Return one process per GPU, or one where there is no GPU."""
    return 1 if device == "cpu" else max(torch.cuda.device_count(), 1)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    """Sum over processes. The backward pass sums gradients; those known to be equal it multiplies, sending nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, replicated: bool) -> Tensor:
        ctx.replicated = replicated
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.replicated:
            return gradient * world_size(), None
        return _Sum.apply(gradient, False), None


def all_reduce(x: Tensor, *, replicated: bool = False) -> Tensor:
    """Return the sum of `x` over the processes, differentiably.

    `replicated`: all processes compute the same from the sum, so its gradient is the same on all of them.
    """
    return x if world_size() == 1 else _Sum.apply(x, replicated)


def all_gather(x: Tensor) -> Tensor:
    """Return the `x` (n, ...) of all processes in rank order, (world_size * n, ...); not differentiable."""
    if world_size() == 1:
        return x
    whole = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole


def broadcast_object(value: Any) -> Any:
    """Return the first process's value; the other processes' is ignored."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def broadcast(x: Tensor) -> None:
    """Overwrite `x` with the first process's `x`."""
    if world_size() > 1:
        whole = x.contiguous()
        dist.broadcast(whole, 0)
        x.copy_(whole)


def require_equal(value: int, what: str, device: torch.device) -> None:
    """Check that all processes have the same `value`; on a GPU without waiting for the answer.

    Raises:
        ValueError: the values differ. On a GPU, CUDA reports a failed assertion a little later instead.
    """
    if world_size() == 1:
        return
    bounds = torch.full((2,), float(value), device=device)
    bounds[1] *= -1
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    if device.type == "cuda":
        torch._assert_async(bounds[0] == -bounds[1], f"{what} is not the same on all processes")
    elif bounds[0] != -bounds[1]:
        raise ValueError(
            f"{what} is {value} here and from {-bounds[1]:.0f} to {bounds[0]:.0f} on the processes; it must be the same"
        )


def any_process(*flags: bool) -> list[bool]:
    """Return for each flag whether any process sets it. Waits for the processes, not for their GPUs."""
    if world_size() == 1:
        return list(flags)
    together = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return [bool(flag) for flag in together]
