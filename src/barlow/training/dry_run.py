"""What `barlow pretrain` is about to do: one line at its start, and all of it for `--dry-run`."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
from torch import Tensor

from barlow.settings.params import Params
from barlow.training import distributed, model, steps
from barlow.training.loss import barlow_twins_loss, form
from barlow.training.state import Training
from barlow.training.views import part

SAMPLES = 8  # in the batch that memory and time are measured with
GIB = 2**30


def headline(run: Training, bf16: bool) -> str:
    """Return one line on what is about to run."""
    p, world = run.p, distributed.world_size()
    return (
        f"{run.views.images:,} images, {run.epoch_steps:,} batches of {p.batch_size} per epoch, {p.epochs} epochs, "
        f"{run.total_steps:,} steps on {run.device}, {world} process(es), {'bf16' if bf16 else 'fp32'}, "
        f"{form(p.batch_size, run.network.dim)} loss"
    )


def describe(params: Params) -> str:
    """Return what would run, from the model to the learning rates; memory and time come from a measured step.

    Raises:
        UserError: as `pretrain.run` does, before it trains.
    """
    p, m = params.pretrain, params.model
    device = distributed.start(p.device)
    processes = p.processes or distributed.default_processes(p.device)
    run = Training(params, device)
    bf16 = model.computes_bf16(p.precision, device)
    local = part(p.batch_size, 0, processes).stop
    activations, seconds = measure(run, params.views.size, bf16)
    parameters = {name: sum(w.numel() for w in part.parameters()) for name, part in run.network.named_children()}
    state = (4 * 3 + 2 * bf16) * sum(parameters.values())  # bytes of weights, gradients, momentum, autocast's copies
    views = 4 * 2 * 3 * params.views.size**2  # bytes of one sample's two views
    memory = state + local * (activations + 3 * views)  # DALI holds two batches ahead
    weights, biases = run.rates(round(p.warmup_epochs * run.epoch_steps))
    last = run.rates(run.total_steps - 1)[0]
    epoch = timedelta(seconds=round(seconds * local * run.epoch_steps))
    whole = timedelta(seconds=round(seconds * local * run.total_steps))
    lines = {
        "model": f"{m.arch}, {m.stem} stem, {parameters['backbone']:,} parameters",
        "projector": f"{'-'.join(map(str, m.projector))}, {parameters['projector']:,} parameters",
        "steps": f"{run.total_steps:,}: {p.epochs} epochs of {run.epoch_steps:,}, of {p.batch_size} images each",
        **({"warning": few} if (few := steps.warning(run.total_steps, p.epochs)) else {}),
        "processes": f"{processes} on {device.type}, {local} images each, {'bf16' if bf16 else 'fp32'}",
        "learning rate": f"{weights:.4g} (weights) and {biases:.4g} (biases) after {p.warmup_epochs:g} epochs of "
        f"warm-up, down to {last:.2g} along a cosine",
        "loss": f"{form(p.batch_size, run.network.dim)} form, of {p.batch_size} x {run.network.dim} embeddings, "
        f"lambda {p.lambd}",
        "memory": f"about {memory / GIB:.2f} GiB per process, {local * activations / GIB:.2f} of it activations",
        "time": f"about {epoch} per epoch, {whole} in all, at the speed of {SAMPLES} images here, without views",
    }
    return "\n".join(f"{name:<14}{text}" for name, text in lines.items())


def measure(run: Training, size: int, bf16: bool) -> tuple[float, float]:
    """Return, per sample, the bytes that the forward pass keeps for the backward pass, and the seconds of a step."""
    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    activations, times = list[int](), list[float]()
    for n in (
        SAMPLES // 2,
        SAMPLES,
        SAMPLES,
    ):  # the first gives the part that does not grow with n; the last is warmed up
        views = torch.randn(2, n, 3, size, size, device=run.device)
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
                z_a, z_b = run.network(*(view.contiguous(memory_format=torch.channels_last) for view in views))
            loss = barlow_twins_loss(z_a, z_b, run.p.lambd).total
        activations.append(sum(held.values()))
        held.clear()
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
        float(loss.detach())
        times.append(time.perf_counter() - started)
    return (activations[-1] - activations[0]) / (SAMPLES - SAMPLES // 2), times[-1] / SAMPLES
