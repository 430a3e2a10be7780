"""Measure a training step: the views of some images, the network forward and backward, the optimizer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, repeat
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from barlow.core import provenance, webdataset
from barlow.settings.params import Params
from barlow.training import distributed, model
from barlow.training.loss import barlow_twins_loss
from barlow.training.state import Training

WARM = 3  # steps before the clock starts: memory, kernels, and the batches that DALI makes ahead
STEPS = (3, 50)  # steps measured, at least and at most
IDLE = 1.3  # seconds by the clock per second of work of all threads, on a processor that does nothing else
SECONDS, MAX_SECONDS = 3.0, 20.0  # measured, if that is between; and in all, whatever the number of steps


def seconds_per_image(params: Params, tars: list[Path]) -> float:
    """Return the time of a training step with these settings, per image of the global batch.

    `tars` are shards of the images, or of some of them: too few for a batch are used several times. Where several GPUs
    would share a batch, one is measured with its part.

    Raises:
        UserError: as `pretrain` does, before it trains.
    """
    p, device = params.pretrain, distributed.local_device(params.pretrain.device)
    gpus = (p.processes or distributed.default_processes(p.device)) if device.type == "cuda" else 1
    local = max(p.batch_size // gpus, 2)
    enough = tars * ceil(local / webdataset.count(tars))
    random = replace(params.model, weights=None)  # as fast, and given weights may be of another network than this one
    run = Training(replace(params, model=random, pretrain=replace(p, batch_size=local)), device, enough)
    bf16 = model.computes_bf16(p.precision, device)
    taken = list[tuple[float, float]]()  # seconds of each step, by the clock and of this process
    for views in _timed(run, taken):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            z_a, z_b = run.twins(*views)
        loss = barlow_twins_loss(z_a, z_b, p.lambd)
        run.update(loss)
        float(loss.total.detach())  # waits for the device
    wall, busy = min(step[0] for step in taken[WARM:]), min(step[1] for step in taken[WARM:])
    if device.type == "cpu":  # what else runs on the machine now is not there for ever
        wall = min(wall, IDLE * busy / torch.get_num_threads())
    return wall / local / gpus


def hardware(params: Params) -> str:
    """Name what would compute, and in which precision."""
    p = params.pretrain
    bf16 = model.computes_bf16(p.precision, distributed.local_device(p.device))
    return f"{provenance.hardware()}, {'bf16' if bf16 else 'fp32'}"


def kind(params: Params) -> str:
    """Return the kind of device that would train: cpu or cuda."""
    return distributed.local_device(params.pretrain.device).type


def _timed(run: Training, taken: list[tuple[float, float]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of views until enough steps are timed; append the seconds from each batch to the next."""
    before = time.perf_counter(), time.process_time()
    for views in chain.from_iterable(repeat(run.views)):
        yield views
        now = time.perf_counter(), time.process_time()
        taken.append((now[0] - before[0], now[1] - before[1]))
        before, measured = now, len(taken) - WARM
        elapsed = sum(wall for wall, _ in taken[WARM:])
        late = measured >= 1 and sum(wall for wall, _ in taken) > MAX_SECONDS
        if late or measured >= STEPS[1] or (measured >= STEPS[0] and elapsed > SECONDS):
            return
