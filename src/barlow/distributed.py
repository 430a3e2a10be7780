"""Processes and the collectives between them, differentiable. With one process each of these costs nothing.

Every process computes the same global loss. A collective's backward pass sums the gradients that the processes send it,
so each process holds world_size times its part of the global gradient, and the mean that DistributedDataParallel
takes over parameters makes it exactly the gradient of one process on the whole batch.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from barlow import files
from barlow.errors import UserError

Group = dist.ProcessGroup | None


def start(device: str) -> torch.device:
    """Join the processes that torchrun started, if it did, and return this one's device (`device`: cpu, cuda, auto).

    Raises:
        UserError: there is no GPU and `device` is cuda.
    """
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("pretrain.device=cuda, and PyTorch sees no GPU here; set it to cpu or auto")
    local = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(local)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return local


def launch(processes: int | None, device: str) -> bool:
    """Run this very command in several processes and wait for them; say whether there was a need to.

    Args:
        processes: how many; None: one a GPU, or one.
        device: cpu, cuda or auto.

    Raises:
        SystemExit: one failed; carries its exit code.
    """
    if processes is None:
        processes = 1 if device == "cpu" else max(torch.cuda.device_count(), 1)
    if processes == 1 or "WORLD_SIZE" in os.environ:
        return False
    os.environ.setdefault("OMP_NUM_THREADS", str(max(files.cpus() // processes, 1)))
    config = LaunchConfig(1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        elastic_launch(config, sys.executable)("-m", "barlow.cli", *sys.argv[1:])
    except ChildFailedError as error:
        raise SystemExit(error.get_first_failure()[1].exitcode) from None
    return True


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's number, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size(group: Group = None) -> int:
    """Return the number of processes."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    """Sum over processes; backward, the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.group), None


class _Gather(torch.autograd.Function):
    """Stack over processes; backward, this process's part of the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.n = group, len(x)
        whole = x.new_empty(world_size(group) * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        start = dist.get_rank(ctx.group) * ctx.n
        return _Sum.apply(gradient, ctx.group)[start : start + ctx.n], None


def all_reduce(x: Tensor, group: Group = None) -> Tensor:
    """Return the sum of `x` over the processes, differentiably."""
    return x if world_size(group) == 1 else _Sum.apply(x, group)


def all_gather(x: Tensor, group: Group = None) -> Tensor:
    """Return every process's `x`, of one shape (n, ...), in rank order, (world_size * n, ...); differentiable."""
    return x if world_size(group) == 1 else _Gather.apply(x, group)


def gather_objects(value: Any) -> list[Any]:
    """Return every process's `value` (small, trusted), in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is set on any process."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)
