"""`barlow finetune`: train the whole network on labels, from pretrained and from random weights.

Reads models/encoder.safetensors and data/shards. Writes reports/finetune.json. On a share of train's labels, both
starts get the same labels, steps and candidate learning rates. On all labels, a network from random weights sees as
many images as pretraining did. The protocol is in docs/evaluation.md.

`barlow finetune --all-labels` trains the pretrained network on all labels of train instead. Writes
models/classifier.onnx and reports/classifier.json. It is no stage of `dvc repro`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from barlow.core import files, webdataset
from barlow.core.errors import UserError
from barlow.core.progress import shown
from barlow.evaluation import features, intervals, probe
from barlow.evaluation.figures import Budget, FineTuned, FineTuning, Network, Supervised, write
from barlow.settings.params import Params
from barlow.training import distributed, model
from barlow.training.optim import warmup_cosine
from barlow.training.views import single_views

WARMUP = 0.1  # of the steps
TRIAL = 0.1  # share of the supervised network's steps that a trial of a learning rate takes
SPLITS = ("train", "val", "test")
Weights = dict[str, Tensor]


def run(params: Params, all_labels: bool = False) -> None:
    """Fine-tune, train the supervised network, write the metrics and print them; or train the classifier.

    Raises:
        UserError: there is no encoder, or no shards; with `all_labels`, a split has no labels, the network's settings
            changed after pretraining, or training diverged.
    """
    if all_labels:
        train_classifier(params)
        return
    started, p = time.monotonic(), params.finetune
    fine_tuned, supervised = {}, None
    pretrained = model.load_encoder()[0].backbone.state_dict()
    if all(next(features.labelled(split), None) for split in SPLITS):
        study = Study(params)
        for share in p.label_shares if p.draws else ():
            budget = Budget(None, share)
            fine_tuned[str(budget)] = study.fine_tune(budget, pretrained)
        if p.supervised_budget > 0:
            supervised = study.supervised()
    write(files.FINETUNING, FineTuning(time.monotonic() - started, fine_tuned, supervised))


def train_classifier(params: Params) -> None:
    """Train the whole network on all labels of train from the pretrained weights, and write it as a classifier."""
    from barlow.evaluation import classifier  # here, so that a bare machine can fine-tune without onnxruntime

    start, trained = model.load_encoder()
    for section in ("model", "views"):
        if json.loads(json.dumps(asdict(getattr(params, section)))) != trained[section]:
            raise UserError(f"params.yaml: {section} differs from that of {files.ENCODER}; run `dvc repro` first")
    if missing := [split for split in SPLITS if next(features.labelled(split), None) is None]:
        text = f"{files.SHARDS} has no labelled images in {', '.join(missing)}, and --all-labels needs some in each of"
        raise UserError(f"{text} {', '.join(SPLITS)}; see docs/own-images.md for how to give labels")
    study, p = Study(params), params.finetune
    steps = max(p.steps, round(p.classifier_epochs * len(study.labelled) / p.batch_size))
    lr, (encoder, head) = study.best(start.backbone.state_dict(), study.labelled, p.lr, steps)
    if not all(weight.isfinite().all() for weight in encoder.state_dict().values()):
        raise UserError(f"finetune.lr={list(p.lr)}: the network diverged to NaN; add a lower learning rate")
    classifier.write(classifier.Tuned(encoder, head.state_dict(), lr, steps), start, trained, params)


class Trained(NamedTuple):
    """A classifier: an encoder and a linear head."""

    encoder: model.FrozenEncoder
    head: nn.Linear


class Study:
    """Train networks on labels of train, choose their learning rates on val and read test once per network."""

    def __init__(self, params: Params) -> None:
        self.p, self.model, self.views, self.pretrain = params.finetune, params.model, params.views, params.pretrain
        self.device = distributed.local_device()
        self.samples = webdataset.Samples(webdataset.tars("train"))
        self.labels = torch.from_numpy(self.samples.labels())
        self.labelled = (self.labels >= 0).nonzero().flatten()
        self.test_images = int((webdataset.Samples(webdataset.tars("test")).labels() >= 0).sum())

    def fine_tune(self, budget: Budget, pretrained: Weights) -> FineTuned:
        """Train on a label budget from pretrained and from random weights, both on the same draws."""
        draws = [
            self.labelled[probe.draw_labels(self.labels[self.labelled], budget.each, [self.p.seed, draw])]
            for draw in range(self.p.draws)
        ]
        tuned = self.few_labels(f"{budget} of labels, pretrained", pretrained, draws)
        random = self.few_labels(f"{budget} of labels, random", None, draws)
        return FineTuned(budget, len(draws[0]), tuned, random)

    def few_labels(self, title: str, start: Weights | None, draws: Sequence[Tensor]) -> Network:
        """Train on each draw of labelled images; the first draw chooses the learning rate."""
        top1, lrs = list[float](), self.p.lr
        for numbers in draws:
            lr, trained = self.best(start, numbers, lrs, self.p.steps)
            top1.append(self.top1(trained, "test"))
            lrs = (lr,)
        return self.report(title, top1, lr)

    def supervised(self) -> Supervised:
        """Train from random weights on all labels, on `supervised_budget` times the images that pretraining saw."""
        p, lrs = self.pretrain, self.p.lr
        epoch = webdataset.count(webdataset.tars("pretrain")) // p.batch_size * p.batch_size
        steps = max(round(self.p.supervised_budget * p.epochs * epoch / self.p.batch_size), 1)
        if len(lrs) > 1:
            lrs = (self.best(None, self.labelled, lrs, max(round(TRIAL * steps), 1))[0],)
        lr, trained = self.best(None, self.labelled, lrs, steps)
        network = self.report("supervised", [self.top1(trained, "test")], lr)
        return Supervised(network, steps * self.p.batch_size)

    def report(self, title: str, top1: list[float], lr: float) -> Network:
        """Print the mean accuracy and return it with its interval and the learning rate that was chosen."""
        accuracy = intervals.mean_accuracy(top1, self.test_images)
        print(f"{title:<28}{accuracy}, learning rate {lr:g}", flush=True)
        return Network(accuracy, lr)

    def best(self, start: Weights | None, numbers: Tensor, lrs: Sequence[float], steps: int) -> tuple[float, Trained]:
        """Train with each learning rate; return the one that is best on val, with its network."""
        trained = {lr: self.train(start, numbers, lr, steps) for lr in lrs}
        lr = max(lrs, key=lambda lr: self.top1(trained[lr], "val")) if len(lrs) > 1 else lrs[0]
        return lr, trained[lr]

    def train(self, start: Weights | None, numbers: Tensor, lr: float, steps: int) -> Trained:
        """Train on the images of train with these numbers."""
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
        images = features.embed(trained.encoder, features.labelled(split), self.device)
        return probe.accuracy(trained.head(images.features).argmax(1), images.labels)

    def fit(self, network: nn.Module, numbers: webdataset.Indices, lr: float, steps: int) -> None:
        """Minimise the cross-entropy by stochastic gradient descent, with warm-up and cosine decay."""
        p = self.p
        optimizer = torch.optim.SGD(network.parameters(), lr, p.momentum, weight_decay=p.weight_decay, nesterov=True)
        bf16 = model.computes_bf16(self.pretrain.precision, self.device)
        batches = single_views(self.samples, numbers, self.views, p.batch_size, steps, p.seed, self.device.index)
        title = f"{len(numbers)} images, learning rate {lr:g}"
        for step, (view, chosen) in enumerate(shown(batches, title, steps, "step")):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                logits = network(view.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), self.labels[chosen].to(self.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, steps, round(WARMUP * steps), lr, 0.0)
            optimizer.step()
