"""The state of a pretraining run: network, optimizer, place in the data, measurements. A checkpoint holds all of it.

While a run trains, only the views are random, and they follow from the seed and the step. So a checkpoint keeps no
random state, and a run resumes at any number of processes with the same global batches.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from barlow.core import files, provenance, webdataset
from barlow.core.errors import UserError
from barlow.settings import loading
from barlow.settings.params import Params
from barlow.training import checkpoint, distributed, health, model
from barlow.training.loss import BarlowTwinsLoss, cross_correlation
from barlow.training.optim import build, warmup_cosine
from barlow.training.views import TwinViews
from barlow.transfer import matching

CORNER = 128  # rows and columns of C kept for the report
NAMED_KEYS = 8  # images named in the message about a loss that is not finite


class Training:
    """One process's part of a run, over the pretrain shards or over other `tars`.

    Raises:
        UserError: no shards, fewer images than a batch, a batch that the processes cannot share, or weights to start
            from that do not fit.
    """

    def __init__(self, params: Params, device: torch.device, tars: list[Path] | None = None) -> None:
        p, world = params.pretrain, distributed.world_size()
        tars = webdataset.tars("pretrain") if tars is None else tars
        if not tars:
            raise UserError(f"there is no {files.SHARDS}/pretrain-*.tar to pretrain on; run `dvc repro shard` first")
        gpu = device.index if device.type == "cuda" else None
        threads = max(files.cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
        self.views = TwinViews(tars, params.views, p.batch_size, p.seed, distributed.rank(), world, gpu, threads)
        if self.views.form != (params.model.channels, params.model.bits):
            text = f"{files.SHARDS} holds {self.views.form}, and params.yaml has model.channels={params.model.channels}"
            raise UserError(f"{text}, model.bits={params.model.bits}; run `dvc repro shard` first")
        self.epoch_steps = len(self.views)
        self.total_steps = p.epochs * self.epoch_steps
        torch.manual_seed(p.seed)
        network = model.BarlowTwins(params.model, params.views.size)
        self.started: matching.Loaded | None = None  # from given weights
        if (given := params.model.weights) is not None:
            self.started = matching.load(given, "model.weights", params, network.backbone, network.projector)
        network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = model.synchronised(network, device) if world > 1 else network
        loading.check_microbatch(p, world)
        self.twins: nn.Module = self.network  # what the loop calls
        if p.microbatch is not None and p.microbatch < p.batch_size // world:
            self.twins = model.Microbatches(self.network, p.microbatch)
        if p.compile:
            for module in [self.network] if self.twins is self.network else self.network.children():
                module.compile()
        if world > 1:
            with warnings.catch_warnings():  # torch 2.15 renames the option, and 2.14 does not know the new name
                warnings.simplefilter("ignore", FutureWarning)
                self.twins = DistributedDataParallel(self.twins, broadcast_buffers=False)  # they are the same already
        self.weights = [w for w in self.network.parameters() if w.ndim > 1]
        self.biases = [w for w in self.network.parameters() if w.ndim <= 1]
        self.optimizer = build(p, self.weights, self.biases)
        self.p, self.device = p, device
        self.step = 0
        self.sums = torch.zeros(len(BarlowTwinsLoss._fields), device=device)  # of the loss and its terms, this epoch
        self.finite_steps = torch.zeros((), dtype=torch.long, device=device)  # until the first that was not
        self.gradient_norm = torch.zeros((), device=device)  # of the epoch's last step
        self.history: list[dict[str, float]] = []  # one row per epoch
        self.correlation: dict[str, Tensor] = {}
        self.warned: set[str] = set()  # names of the bounds that a warning was printed for
        # A run's identity is what decides its weights: not where it runs, nor how often it is saved or measured.
        free = replace(p, checkpoint_seconds=0, checkpoint_steps=None, processes=None, device="auto")
        free = replace(free, knn_epochs=None, min_std=0, max_correlation=1)
        self.identity = {
            "model": asdict(params.model),
            "views": asdict(params.views),
            "pretrain": asdict(free),
            "data": self.views.digest,
            **({"weights": self.started.source} if self.started else {}),
        }
        self.folder = checkpoint.folder(self.identity | {"code": provenance.code_hash("pretrain")})
        self.writer = checkpoint.Writer(self.folder)

    def rates(self, step: int) -> tuple[float, float]:
        """Return the learning rates (of weights, of biases) at a step."""
        warmup = round(self.p.warmup_epochs * self.epoch_steps)
        peaks = [rate * self.p.batch_size / 256 for rate in (self.p.lr_weights, self.p.lr_biases)]
        weights, biases = (
            warmup_cosine(step, self.total_steps, warmup, peak, self.p.final_lr * peak) for peak in peaks
        )
        return weights, biases

    def update(self, loss: BarlowTwinsLoss) -> None:
        """Backward pass, learning rates, optimizer step."""
        loss.total.backward()  # type: ignore[no-untyped-call]
        for group, rate in zip(self.optimizer.param_groups, self.rates(self.step), strict=True):
            group["lr"] = rate
        if (self.step + 1) % self.epoch_steps == 0:
            self.gradient_norm = norm([w.grad for w in self.weights + self.biases if w.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def record(self, loss: BarlowTwinsLoss, z_a: Tensor, z_b: Tensor) -> None:
        """Count a finished step; at three steps of a run, keep a corner of C. Nothing else is read from the device."""
        self.sums += torch.stack([term.detach().float() for term in loss])
        self.finite_steps += self.sums.isfinite().all()
        for name, step in {"before": 0, "during": self.total_steps // 2, "after": self.total_steps - 1}.items():
            if self.step == step:
                corner = cross_correlation(z_a.detach()[:, :CORNER], z_b.detach()[:, :CORNER])
                self.correlation[name] = corner.cpu()
        self.step += 1

    def check_finite(self) -> None:
        """Stop the run once the loss or a weight is infinite or NaN.

        Raises:
            UserError: names the step, the learning rates, images of the batch and the last good checkpoint.
        """
        finite = int(self.finite_steps)
        largest = torch.stack(torch._foreach_norm(self.weights + self.biases, float("inf")))
        if finite == self.step and largest.isfinite().all():
            return
        step = min(finite, self.step - 1)
        weights, biases = self.rates(step)
        keys = self.views.keys(step)
        self.writer.wait()
        what = "loss is" if finite < self.step else "weights are"
        lower = ["lr_weights", "lr_biases", *(["trust_coefficient"] if self.p.optimizer in ("lars", "larc") else [])]
        *first, last = (f"pretrain.{name}={getattr(self.p, name)}" for name in lower)
        raise UserError(
            f"the {what} not finite at step {step}, with learning rates {weights:.3g} (weights) and {biases:.3g} "
            f"(biases): lower {', '.join(first)} or {last}, or raise pretrain.warmup_epochs={self.p.warmup_epochs}; "
            f"the batch was {', '.join(keys[:NAMED_KEYS])}"
            f"{f' and {len(keys) - NAMED_KEYS} more' if len(keys) > NAMED_KEYS else ''}; "
            f"the last good checkpoint is {checkpoint.newest(self.folder) or 'none yet'}"
        )

    def figures(self, terms: Iterable[Tensor]) -> dict[str, float]:
        """Return the loss, its two terms as means over the entries of C that they sum, and the learning rate."""
        total, invariance, redundancy = (float(term.detach()) for term in terms)
        dim = self.network.dim
        row = {"loss": total, "invariance": invariance / dim, "redundancy": redundancy / max(dim * (dim - 1), 1)}
        return row | {"lr": self.optimizer.param_groups[0]["lr"]}

    def end_epoch(self, z: Tensor, measured: dict[str, float]) -> dict[str, float]:
        """Add the epoch's row to the history and return it; `z` are the epoch's last embeddings."""
        self.check_finite()
        row = self.figures(self.sums / self.epoch_steps)
        row["std"] = health.spread(distributed.all_gather(z.detach().float()))  # of the global batch
        row |= {"weight_norm": float(norm(self.weights + self.biases)), "gradient_norm": float(self.gradient_norm)}
        self.sums.zero_()
        self.history.append(row | measured)
        if len(self.history) > self.p.warmup_epochs and distributed.rank() == 0:
            for name, text in collapse(row, self.p.min_std, self.p.max_correlation).items():
                if name not in self.warned:
                    print(f"warning: {text}", file=sys.stderr, flush=True)
                self.warned.add(name)
        return self.history[-1]

    def save(self) -> None:
        """Write a checkpoint in a thread; `writer.wait` waits for it. All hold one state; the first process writes."""
        self.check_finite()
        if distributed.rank() != 0:
            return
        correlation = {f"correlation.{name}": value for name, value in self.correlation.items()}
        metadata: dict[str, Any] = {"identity": self.identity, "world_size": distributed.world_size()}
        metadata |= {"history": self.history.copy(), "views": self.views.state_dict()}
        self.writer.save(self.step, self.state() | correlation, metadata)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that training changes; no copies."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for i, w in enumerate(self.weights + self.biases):
            tensors |= {f"{name}.{i}": value for name, value in self.optimizer.state[w].items()}
        return tensors | {"sums": self.sums, "finite_steps": self.finite_steps}

    def resume(self) -> str:
        """Resume from the newest checkpoint of this run, if there is one; return a line that says so.

        The first process reads it and sends it to the others: their disks may hold other checkpoints, or none.
        """
        found = checkpoint.latest(self.folder) if distributed.rank() == 0 else None
        tensors, metadata = found or ({}, None)
        metadata, self.correlation = distributed.broadcast_object((metadata, _part(tensors, "correlation.")))
        if metadata is None:
            return "from the start"
        with torch.no_grad():
            for name, tensor in self.state().items():
                if found:
                    tensor.copy_(tensors[name])
                distributed.broadcast(tensor)
        self.step, self.history = metadata["step"], metadata["history"]
        self.views.load_state_dict(metadata["views"])
        before, now = metadata["world_size"], distributed.world_size()
        same = f"; now {now} process(es), before {before}: the same batches of {self.p.batch_size}, but other rounding"
        return f"going on from step {self.step} of {self.total_steps}{same if before != now else ''}"


def collapse(row: dict[str, float], min_std: float, max_correlation: float) -> dict[str, str]:
    """Return {bound: warning} of the bounds of collapse that an epoch's row breaks, with the usual causes."""
    texts, correlation = {}, row["redundancy"] ** 0.5
    if row["std"] < min_std:
        texts["min_std"] = (
            f"the embeddings are collapsing: their standard deviation is {row['std']:.3f} of an even spread's, below "
            f"pretrain.min_std={min_std}. Usual causes: a learning rate too high, too short a warm-up, images that are "
            f"all alike"
        )
    if correlation > max_correlation:
        texts["max_correlation"] = (
            f"the embedding's dimensions repeat each other: root mean square correlation {correlation:.3f}, above "
            f"pretrain.max_correlation={max_correlation}. Usual causes: pretrain.lambd too low, a learning rate too "
            f"high, a projector wider than the data has to say"
        )
    return texts


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all entries of some tensors together, in float64, since squares of float32 may overflow."""
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors], 2, torch.float64)
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
