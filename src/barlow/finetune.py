"""`barlow finetune`: the whole network trained on labels, from pretrained and from random weights.

Reads models/encoder.safetensors and data/shards. Writes reports/finetune.json. On a share of train's labels both starts
get the same labels, steps and choice of learning rates; on all of them, a network from random weights sees as many
images as pretraining did. The protocol is in docs/evaluation.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from barlow.core import files, webdataset
from barlow.evaluation import features, intervals, probe
from barlow.settings.params import Params
from barlow.training import distributed, model
from barlow.training.optim import warmup_cosine
from barlow.training.views import single_views

WARMUP = 0.1  # of the steps
TRIAL = 0.1  # of the supervised network's steps, to choose its learning rate with
SECONDS = 10  # between two lines where there is no terminal
Weights = dict[str, Tensor]
Batch = TypeVar("Batch")


def run(params: Params) -> None:
    """Fine-tune, train the supervised network, write the figures and print them.

    Raises:
        UserError: there is no encoder, or no shards.
    """
    started, p = time.monotonic(), params.finetune
    metrics: dict[str, float] = {}
    pretrained = model.load_encoder()[0].backbone.state_dict()
    if all(next(features.labelled(split), None) for split in ("train", "val", "test")):
        study = Study(params)
        for share in p.label_shares:
            for name, start in {"finetuned": pretrained, "scratch": None}.items():
                metrics |= study.few_labels(f"{name}_share_{100 * share:g}", start, share)
        if p.supervised_budget > 0:
            metrics |= study.supervised()
    files.write_json(files.REPORTS / "finetune.json", metrics | {"seconds": time.monotonic() - started})


class Trained(NamedTuple):
    """A classifier: what it embeds images with, and what it reads the embeddings with."""

    encoder: model.FrozenEncoder
    head: nn.Linear


class Study:
    """Networks trained on labels of train, their learning rates chosen on val, each read on test once."""

    def __init__(self, params: Params) -> None:
        self.p, self.model, self.views, self.pretrain = params.finetune, params.model, params.views, params.pretrain
        self.device = distributed.local_device()
        self.samples = webdataset.Samples(webdataset.tars("train"))
        self.labels = torch.from_numpy(self.samples.labels())
        self.labelled = (self.labels >= 0).nonzero().flatten()
        self.test_images = int((webdataset.Samples(webdataset.tars("test")).labels() >= 0).sum())

    def few_labels(self, name: str, start: Weights | None, share: float) -> dict[str, float]:
        """Fine-tune on a share of the labels, a few draws of them; the first one chooses the learning rate."""
        top1, lrs = list[float](), self.p.lr
        for draw in range(self.p.draws):
            drawn = probe.draw_labels(self.labels[self.labelled], share, [self.p.seed, draw])
            lr, trained = self.best(start, self.labelled[drawn], lrs, self.p.steps)
            top1.append(self.top1(trained, "test"))
            lrs = (lr,)
        return self.report(name, top1, lr)

    def supervised(self) -> dict[str, float]:
        """Train from random weights on all labels, with `supervised_budget` times the images that pretraining saw."""
        p, lrs = self.pretrain, self.p.lr
        epoch = webdataset.count(webdataset.tars("pretrain")) // p.batch_size * p.batch_size
        steps = max(round(self.p.supervised_budget * p.epochs * epoch / self.p.batch_size), 1)
        if len(lrs) > 1:
            lrs = (self.best(None, self.labelled, lrs, max(round(TRIAL * steps), 1))[0],)
        lr, trained = self.best(None, self.labelled, lrs, steps)
        top1 = self.top1(trained, "test")
        return self.report("supervised", [top1], lr) | {"supervised_images": steps * self.p.batch_size}

    def report(self, name: str, top1: list[float], lr: float) -> dict[str, float]:
        """Print a figure and return it with its interval and the learning rate that was chosen."""
        figures = intervals.figure(f"{name}_top1", top1, self.test_images)
        value, low, high = figures.values()
        print(f"{name:<24}{value:.1f} ({low:.1f} to {high:.1f}), learning rate {lr:g}", flush=True)
        return figures | {f"{name}_lr": lr}

    def best(self, start: Weights | None, numbers: Tensor, lrs: Sequence[float], steps: int) -> tuple[float, Trained]:
        """Train with each learning rate, and return the one that is best on val with what came of it."""
        trained = {lr: self.train(start, numbers, lr, steps) for lr in lrs}
        lr = max(lrs, key=lambda lr: self.top1(trained[lr], "val")) if len(lrs) > 1 else lrs[0]
        return lr, trained[lr]

    def train(self, start: Weights | None, numbers: Tensor, lr: float, steps: int) -> Trained:
        """Train on some images of train."""
        torch.manual_seed(self.p.seed)
        encoder = model.FrozenEncoder(self.model, self.views)
        if start is not None:
            encoder.backbone.load_state_dict(start)
        head = nn.Linear(encoder.backbone.dim, len(webdataset.classes()))
        nn.init.zeros_(head.weight)
        network = nn.Sequential(encoder.backbone, head).to(self.device).to(memory_format=torch.channels_last)
        self.fit(network.train().requires_grad_(True), numbers.numpy(), lr, steps)
        network.eval().requires_grad_(False)
        return Trained(encoder.to(self.device), head.cpu())

    def top1(self, trained: Trained, split: str) -> float:
        """Return the accuracy on a split in percent."""
        found = features.embed(trained.encoder, features.labelled(split), self.device)
        return probe.accuracy(trained.head(found.features).argmax(1), found.labels)

    def fit(self, network: nn.Module, numbers: webdataset.Indices, lr: float, steps: int) -> None:
        """Minimise the cross-entropy by stochastic gradient descent, with warm-up and cosine decay."""
        p = self.p
        optimizer = torch.optim.SGD(network.parameters(), lr, p.momentum, weight_decay=p.weight_decay, nesterov=True)
        bf16 = model.computes_bf16(self.pretrain.precision, self.device)
        batches = single_views(self.samples, numbers, self.views, p.batch_size, steps, p.seed, self.device.index)
        for step, (view, chosen) in enumerate(shown(batches, steps, f"{len(numbers)} images, learning rate {lr:g}")):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                logits = network(view.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), self.labels[chosen].to(self.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, steps, round(WARMUP * steps), lr, 0.0)
            optimizer.step()


def shown(batches: Iterable[Batch], steps: int, what: str) -> Iterator[Batch]:
    """Pass batches on, with a bar in a terminal, else a line every ten seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm  # here, so that a bare machine can train without it

        yield from tqdm(batches, what, steps, leave=False, unit="step")
        return
    said = time.monotonic()
    for step, batch in enumerate(batches, 1):
        yield batch
        if time.monotonic() - said > SECONDS:
            print(f"{what}: step {step}/{steps}", flush=True)
            said = time.monotonic()
