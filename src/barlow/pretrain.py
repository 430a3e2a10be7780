"""`barlow pretrain`: learn an encoder without labels, in one process per GPU; on several machines, under torchrun.

Reads data/shards/pretrain-*.tar. Starts from `model.weights`, if given. Writes models/encoder.safetensors (backbone,
whitening and, for a run that goes on from it, projector), models/correlation.safetensors (a corner of C at the first,
the middle and the last step), reports/pretrain.json and the curves in reports/pretrain/.
While a run trains, a folder in models/resume holds its checkpoints. Started again, it resumes from the last one.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from barlow import __version__
from barlow.core import files, provenance
from barlow.core.errors import Interrupted
from barlow.core.weights import save_weights
from barlow.evaluation import features
from barlow.settings.params import Params
from barlow.training import checkpoint, distributed, health, model
from barlow.training.dry_run import describe, headline
from barlow.training.loss import ablated_loss
from barlow.training.progress import Curves, Progress
from barlow.training.state import Training

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM can send USR1 before a job's time is over


def run(params: Params, dry_run: bool = False) -> None:
    """Train for `pretrain.epochs` over the pretrain shards, from the last checkpoint of the same run if there is one.

    `dry_run` prints what would run, and trains nothing.

    Raises:
        UserError: no device of the kind asked for, fewer images than a batch, a batch that the processes cannot
            share, a loss that is no longer finite, or a disk that is full.
        Interrupted: SIGTERM, SIGINT or SIGUSR1 came; a checkpoint was written.
    """
    if dry_run:
        print(describe(params))
        return
    if distributed.launch(params.pretrain.processes, params.pretrain.device):
        return
    device = distributed.start(params.pretrain.device)
    try:
        train(params, device)
    finally:
        distributed.stop()


def train(params: Params, device: torch.device, written: type[Curves] = Curves) -> None:
    """Train in this process, one of `distributed.world_size()`; `written` keeps a row per epoch."""
    p, run = params.pretrain, Training(params, device)
    bf16 = model.computes_bf16(p.precision, device)
    resumed = run.resume()
    chatty = distributed.rank() == 0
    if chatty:
        for text in checkpoint.others(run.folder, run.identity):
            print(f"warning: {text}", file=sys.stderr)
        if few := health.few_steps(run.total_steps, p.epochs):
            print(f"warning: {few}", file=sys.stderr)
        started = [run.started.text] if run.started else []
        print(headline(run, bf16), *started, resumed, sep="\n", flush=True)
    run.views.build()
    curves = written(run.history)
    saved = time.monotonic()

    with stop_signals() as stopping, Progress(run.step, run.epoch_steps, p.epochs, p.batch_size, chatty) as progress:
        while run.step < run.total_steps:
            for view_a, view_b in progress.waits(run.views):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    z_a, z_b = run.twins(view_a, view_b)
                loss = ablated_loss(z_a, z_b, p.lambd, p.ablate)
                run.update(loss)
                run.record(loss, z_a, z_b)

                if progress.due():
                    run.check_finite()
                    progress.show(run.figures(loss))
                if run.step % run.epoch_steps == 0:
                    row = run.end_epoch(z_a, progress.epoch_figures() | online_knn(run, params))
                    curves.write(row)
                    progress.end_epoch(row)
                run.writer.check()
                by_time = time.monotonic() - saved > p.checkpoint_seconds
                by_step = p.checkpoint_steps is not None and run.step % p.checkpoint_steps == 0
                stop, save = distributed.any_process(bool(stopping), by_time or by_step)
                if stop or save:
                    run.save()
                    saved = time.monotonic()
                if stop:
                    run.writer.wait()
                    raise Interrupted(f"stopped at step {run.step} of {run.total_steps}; run again to go on from there")
    run.writer.wait()
    if chatty:
        finish(run, params)


def finish(run: Training, params: Params) -> None:
    """Write what later stages read, then delete this run's checkpoints, so that a forced run trains again."""
    metadata = run.identity | {"version": __version__, "steps": run.step}
    encoder = frozen(run, params)
    features.whiten(encoder, run.device)
    # The projector lies beside the encoder for a run that goes on from it; nothing else reads it.
    projector = {f"{model.PROJECTOR}{name}": value for name, value in run.network.projector.state_dict().items()}
    save_weights(files.ENCODER, encoder.state_dict() | projector, metadata)
    save_weights(files.CORRELATION, run.correlation, {})
    whole = {"epochs": len(run.history), "steps": run.step, "seconds": sum(row["seconds"] for row in run.history)}
    where = {"hardware": provenance.hardware(), "processes": distributed.world_size()}
    files.write_json(files.REPORTS / "pretrain.json", run.history[-1] | whole | where)
    shutil.rmtree(run.folder, ignore_errors=True)


def frozen(run: Training, params: Params) -> model.FrozenEncoder:
    """Return the encoder as it is now, not whitened."""
    encoder = model.FrozenEncoder(params.model, params.views).to(run.device)
    encoder.backbone.load_state_dict(run.network.backbone.state_dict())
    return encoder


def online_knn(run: Training, params: Params) -> dict[str, float]:
    """Return the kNN accuracy on val every `pretrain.knn_epochs` epochs, where there are labels."""
    every, epoch = params.pretrain.knn_epochs, run.step // run.epoch_steps
    if every is None or epoch % every:
        return {}
    return features.knn_on_val(frozen(run, params), run.device)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list to which each signal is added, instead of ending the process."""
    received: list[int] = []
    before = [signal.signal(kind, lambda number, _: received.append(number)) for kind in STOP]
    try:
        yield received
    finally:
        for kind, handler in zip(STOP, before, strict=True):
            signal.signal(kind, handler)
