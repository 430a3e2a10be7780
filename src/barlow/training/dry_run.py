"""What `barlow pretrain` is about to do: one line at its start, and all of it for `--dry-run`."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
from torch import Tensor, nn

from barlow.settings import loading
from barlow.settings.params import TIMM, Params, Pretrain
from barlow.training import distributed, health, model
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
        f"{run.total_steps:,} steps on {run.device}, {world} process(es), {at_a_time(p, p.batch_size // world)}"
        f"{'bf16' if bf16 else 'fp32'}, {form(p.batch_size, run.network.dim)} loss"
    )


def at_a_time(p: Pretrain, local: int) -> str:
    """Return words on microbatches, if the `local` images of a process do not go through the network at once."""
    return f"{p.microbatch} images at a time, " if p.microbatch is not None and p.microbatch < local else ""


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
    loading.check_microbatch(p, processes)
    held = min(p.microbatch or local, local)  # images whose activations are in memory
    activations, seconds = measure(run, run.network, params.views.size, bf16)
    activations *= local
    if held < local:  # of the backbone, one view of a microbatch
        kept, seconds = measure(run, run.twins, params.views.size, bf16)
        activations = local * kept + held * (activations / local - kept) / 2
    parameters = {name: sum(w.numel() for w in part.parameters()) for name, part in run.network.named_children()}
    state = (4 * 2 + 2 * bf16) * sum(parameters.values())  # bytes of weights, gradients, autocast's copies
    state += sum(value.nbytes for each in run.optimizer.state.values() for value in each.values())
    views = 4 * 2 * 3 * params.views.size**2  # bytes of one sample's two views
    memory = state + activations + local * 3 * views  # DALI holds two batches ahead
    weights, biases = run.rates(round(p.warmup_epochs * run.epoch_steps))
    last = run.rates(run.total_steps - 1)[0]
    epoch = timedelta(seconds=round(seconds * local * run.epoch_steps))
    whole = timedelta(seconds=round(seconds * local * run.total_steps))
    stem = "" if m.arch.startswith(TIMM) else f"{m.stem} stem, "
    lines = {
        "model": f"{m.arch}, {stem}{parameters['backbone']:,} parameters",
        **({"weights": run.started.text} if run.started else {}),
        "projector": f"{'-'.join(map(str, m.projector))}, {parameters['projector']:,} parameters",
        "steps": f"{run.total_steps:,}: {p.epochs} epochs of {run.epoch_steps:,}, of {p.batch_size} images each",
        **({"warning": few} if (few := health.few_steps(run.total_steps, p.epochs)) else {}),
        "processes": f"{processes} on {device.type}, {local} images each, "
        f"{at_a_time(p, local)}{'bf16' if bf16 else 'fp32'}",
        "optimizer": f"{p.optimizer}, momentum {p.momentum:g}, weight decay {p.weight_decay:g}",
        "learning rate": f"{weights:.4g} (weights) and {biases:.4g} (biases) after {p.warmup_epochs:g} epochs of "
        f"warm-up, down to {last:.2g} along a cosine",
        "loss": f"{form(p.batch_size, run.network.dim)} form, of {p.batch_size} x {run.network.dim} embeddings, "
        f"lambda {p.lambd}",
        "memory": f"about {memory / GIB:.2f} GiB per process, {activations / GIB:.2f} of it activations",
        "time": f"about {epoch} per epoch, {whole} in all, at the speed of {SAMPLES} images here, without views",
    }
    return "\n".join(f"{name:<14}{text}" for name, text in lines.items())


def measure(run: Training, embed: nn.Module, size: int, bf16: bool) -> tuple[float, float]:
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
        views = torch.randn(2, n, run.views.form.channels, size, size, device=run.device)
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
                z_a, z_b = embed(*(view.contiguous(memory_format=torch.channels_last) for view in views))
            loss = barlow_twins_loss(z_a, z_b, run.p.lambd).total
        activations.append(sum(held.values()))
        held.clear()
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
        float(loss.detach())
        times.append(time.perf_counter() - started)
    return (activations[-1] - activations[0]) / (SAMPLES - SAMPLES // 2), times[-1] / SAMPLES
