"""`barlow pretrain`: learn an encoder without labels, in one process a GPU; on several machines, under torchrun.

Reads data/shards/pretrain-*.tar. Writes models/encoder.safetensors (the backbone), models/correlation.safetensors (a
corner of C at the first and the last step), reports/pretrain.json and the curves in reports/pretrain/. While it
runs, models/resume/ holds its checkpoints: started again after a crash it goes on from the last one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from barlow import __version__, checkpoint, distributed, files, model, shards
from barlow.curves import Curves, Meter, describe
from barlow.errors import Interrupted, UserError
from barlow.lars import LARS
from barlow.loss import BarlowTwinsLoss, barlow_twins_loss, cross_correlation
from barlow.params import Params, Pretrain
from barlow.schedule import warmup_cosine
from barlow.views import TwinViews

RESUME = Path("models/resume")
CORNER = 128  # dimensions of C that are kept for the report
AGREE_STEPS = 16  # between two agreements of several processes on whether to stop or to save


class Training:
    """The state of a run, all of which a checkpoint holds: network, optimizer, views, step and what was measured."""

    def __init__(self, params: Params, tars: list[Path], device: torch.device) -> None:
        p, rank, world = params.pretrain, distributed.rank(), distributed.world_size()
        device_id = device.index if device.type == "cuda" else None
        threads = max(files.cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
        self.views = TwinViews(tars, params.views, p.batch_size // world, p.seed, rank, world, device_id, threads)
        torch.manual_seed(p.seed)
        self.network = model.BarlowTwins(params.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        weights = [w for w in self.network.parameters() if w.ndim > 1]
        biases = [w for w in self.network.parameters() if w.ndim <= 1]
        groups = [{"params": weights}, {"params": biases}]
        self.optimizer = LARS(groups, 0.0, p.momentum, p.weight_decay, p.trust_coefficient)
        self.weights = weights + biases
        self.step = 0
        self.sums = {name: torch.zeros((), device=device) for name in BarlowTwinsLoss._fields}  # of this epoch
        self.history: list[dict[str, float]] = []  # a row an epoch
        self.correlation: dict[str, Tensor] = {}

    def record(self, loss: BarlowTwinsLoss, z_a: Tensor, z_b: Tensor, last_step: int) -> None:
        """Count a finished step; nothing is read back from the device."""
        for name, value in loss._asdict().items():
            self.sums[name] += value.detach()
        for name, step in {"before": 0, "after": last_step}.items():
            if self.step == step:
                corner = cross_correlation(z_a.detach()[:, :CORNER], z_b.detach()[:, :CORNER])
                self.correlation[name] = corner.cpu()
        self.step += 1

    def check_finite(self, p: Pretrain) -> None:
        """Refuse to go on, and to save, after the loss has become infinite or NaN."""
        if not torch.isfinite(self.sums["total"]):
            raise UserError(
                f"the loss is not finite by step {self.step}: lower pretrain.lr_weights={p.lr_weights} or "
                f"pretrain.trust_coefficient={p.trust_coefficient}, or raise pretrain.warmup_epochs={p.warmup_epochs}"
            )

    def end_epoch(self, steps: int, dim: int, measured: dict[str, float]) -> dict[str, float]:
        """Return the epoch's means and start the next; per entry of C, the two terms tell more than the loss does."""
        total, on_diagonal, off_diagonal = (float(self.sums[name]) / steps for name in BarlowTwinsLoss._fields)
        for value in self.sums.values():
            value.zero_()
        row = {"loss": total, "on_diagonal": on_diagonal / dim, "off_diagonal": off_diagonal / max(dim * (dim - 1), 1)}
        self.history.append(row | {"lr": self.optimizer.param_groups[0]["lr"]} | measured)
        return self.history[-1]

    def save(self, fingerprint: str) -> None:
        """Write a checkpoint; every process must call this at the same step."""
        views = distributed.gather_objects(self.views.state_dict())
        if distributed.rank() != 0:
            return
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"momentum.{i}": self.optimizer.state[w]["momentum_buffer"] for i, w in enumerate(self.weights)}
        tensors |= {f"sums.{name}": value for name, value in self.sums.items()}
        tensors |= {f"correlation.{name}": value for name, value in self.correlation.items()}
        tensors |= {f"pipeline.{i}": _from_bytes(state.pop("pipeline")) for i, state in enumerate(views)}
        metadata = {"fingerprint": fingerprint, "history": self.history, "views": views}
        checkpoint.save(RESUME, self.step, tensors, metadata)

    def resume(self, fingerprint: str) -> bool:
        """Load the newest checkpoint of this run, if there is one."""
        found = checkpoint.latest(RESUME, fingerprint)
        if found is None:
            return False
        tensors, metadata = found
        self.step, self.history = metadata["step"], metadata["history"]
        self.network.load_state_dict(_part(tensors, "network."))
        for i, w in enumerate(self.weights):
            self.optimizer.state[w]["momentum_buffer"] = tensors[f"momentum.{i}"].to(w.device)
        for name, value in _part(tensors, "sums.").items():
            self.sums[name].copy_(value)
        self.correlation = _part(tensors, "correlation.")
        rank = distributed.rank()
        pipeline = tensors[f"pipeline.{rank}"].numpy().tobytes()
        self.views.load_state_dict(metadata["views"][rank] | {"pipeline": pipeline})
        return True


def run(params: Params) -> None:
    """Train for `pretrain.epochs` over the pretrain shards, going on from a checkpoint of the same run.

    Raises:
        UserError: no device of the kind asked for, fewer images than a batch, a batch that the processes cannot
            share, or a loss that is no longer finite.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was written.
    """
    if distributed.launch(params.pretrain.processes, params.pretrain.device):
        return
    device = distributed.start(params.pretrain.device)
    try:
        train(params, device)
    finally:
        distributed.stop()


def train(params: Params, device: torch.device) -> None:
    """Train in this process, one of `distributed.world_size()`."""
    p, world = params.pretrain, distributed.world_size()
    if p.batch_size % world:
        raise UserError(f"pretrain.batch_size={p.batch_size} is not divisible by {world} processes; use a multiple")
    tars = shards.tars("pretrain")
    run = Training(params, tars, device)
    identity = {
        "model": asdict(params.model),
        "views": asdict(params.views),
        "pretrain": asdict(replace(p, checkpoint_seconds=0)),
        "data": shards.digest(tars),
    }
    fingerprint = checkpoint.fingerprint(**identity, world_size=world)
    epoch_steps = len(run.views)
    total_steps, warmup_steps = p.epochs * epoch_steps, round(p.warmup_epochs * epoch_steps)
    bf16 = computes_bf16(p.precision, device)
    say(f"{p.epochs} epochs of {epoch_steps} steps of {p.batch_size} on {device}, {world} process(es), bf16: {bf16}")
    if run.resume(fingerprint):
        say(f"going on from step {run.step} of {total_steps}")
    twins: nn.Module = DistributedDataParallel(run.network) if world > 1 else run.network
    curves, meter, saved = Curves(run.history), Meter(p.batch_size), time.monotonic()

    with stop_signals() as stopping:
        while run.step < total_steps:
            for view_a, view_b in meter.waits(run.views):
                for group, rate in zip(run.optimizer.param_groups, (p.lr_weights, p.lr_biases), strict=True):
                    peak = rate * p.batch_size / 256
                    group["lr"] = warmup_cosine(run.step, total_steps, warmup_steps, peak, p.final_lr * peak)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    z_a, z_b = twins(_channels_last(view_a), _channels_last(view_b))
                loss = barlow_twins_loss(z_a, z_b, p.lambd)
                loss.total.backward()  # type: ignore[no-untyped-call]
                run.optimizer.step()
                run.optimizer.zero_grad()
                run.record(loss, z_a, z_b, total_steps - 1)

                if run.step % epoch_steps == 0:
                    run.check_finite(p)
                    row = run.end_epoch(epoch_steps, z_a.shape[1], meter.row())
                    curves.write(row)
                    say(f"epoch {len(run.history)}/{p.epochs}  {describe(row)}")
                if world == 1 or run.step % AGREE_STEPS == 0:
                    stop = distributed.any_process(bool(stopping), device)
                    if stop or distributed.any_process(time.monotonic() - saved > p.checkpoint_seconds, device):
                        run.check_finite(p)
                        run.save(fingerprint)
                        saved = time.monotonic()
                    if stop:
                        raise Interrupted(f"stopped at step {run.step} of {total_steps}; run again to go on from there")
    if distributed.rank() == 0:
        finish(run, identity)


def finish(run: Training, identity: dict[str, Any]) -> None:
    """Write what later stages read, then drop the checkpoints: a forced run should train again."""
    metadata = identity | {"version": __version__, "steps": run.step}
    model.save_weights(files.ENCODER, run.network.backbone.state_dict(), metadata)
    model.save_weights(files.CORRELATION, run.correlation, {})
    whole = {"epochs": len(run.history), "seconds": sum(row["seconds"] for row in run.history)}
    files.write_json(files.REPORTS / "pretrain.json", run.history[-1] | whole)
    checkpoint.clear(RESUME)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that SIGTERM and SIGINT add themselves to, instead of ending the process."""
    received: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, lambda number, _: received.append(number)) for kind in kinds]
    try:
        yield received
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def computes_bf16(precision: str, device: torch.device) -> bool:
    """Say whether to autocast to bfloat16: `auto` does where the processor computes it and does not emulate it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def say(text: str) -> None:
    """Print a line from one process."""
    if distributed.rank() == 0:
        print(text, flush=True)


def _channels_last(view: Tensor) -> Tensor:
    return view.contiguous(memory_format=torch.channels_last)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _from_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
