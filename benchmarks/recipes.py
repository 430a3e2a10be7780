"""The recipes that `peers.py` compares: ours, lightly's and solo-learn's Barlow Twins for small images, on the CPU.

Each is a function (params, seed, steps, batch_size) that returns a `Run`. Alike in all: the backbone of `model` in
params.yaml, the input side `views.size`, channels-last memory, one precision (`pretrain.precision`) with the loss in
float32. A recipe's own are its views, projector, loss, optimizer, batch and schedule. The schedules are computed per
step, over `steps` steps.

ours: TwinViews, Training and the loss, as `barlow pretrain` uses them. `steps` takes the place of `pretrain.epochs`;
    the warm-up takes at most half of them.

lightly: BYOLView1Transform, BYOLView2Transform, ProjectionHead and BarlowTwinsLoss are the package's (1.6.0). The other
    numbers are those of its docs/source/getting_started/benchmarks/cifar10_benchmark.py (BarlowTwinsModel): batch 128;
    no blur; projector 2048-2048 (its two layers for CIFAR-10); SGD with rate 0.06 per 128 images, momentum 0.9, weight
    decay 5e-4; cosine to 0 without warm-up (there per epoch: too coarse where a run has three epochs).

solo-learn: version 1.0.2 needs torch 1.9, so what follows is our own short version of its code: solo/losses/barlow.py,
    solo/methods/barlow_twins.py (projector with biases), solo/utils/lars.py and CustomTransform of
    solo/data/pretrain_dataloader.py. The numbers are those of scripts/pretrain/cifar/barlow.yaml and
    augmentations/asymmetric.yaml: batch 256; projector 2048-2048-2048; loss times 0.1; crop 0.08 to 1, bicubic; no
    blur; solarize 0 and 0.2; LARS with rate 0.3 per 256 images, weight decay 1e-4, eta 0.02, clipped, none of the two
    for biases and norms. Defaults of its code: lambda 0.0051, momentum 0.9 (solo/args/pretrain.py), warm-up of 10
    epochs from 3e-5, cosine to 0 (solo/methods/base.py). Its runs have 1000 epochs; here the warm-up takes at most a
    tenth of the steps. Its online classifier, which the encoder does not feel, is left out.

The peers' images come as for their users: Pillow decodes, torchvision distorts, in one DataLoader worker per processor.
In their favour, the workers live on between epochs, and their loss is computed once both views are through.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from barlow.core import files, webdataset
from barlow.settings.params import Params
from barlow.training import model
from barlow.training.backbone import backbone as backbone_of
from barlow.training.optim import warmup_cosine

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, with which both peers normalise
LARGEST = 64  # px; above it other recipes of the peers are nearer


class Run(NamedTuple):
    """A training: each `next(losses)` is a step, which returns its loss."""

    backbone: nn.Module
    batch_size: int
    losses: Iterator[Tensor]


def ours(p: Params, seed: int, steps: int, batch_size: int | None = None) -> Run:
    from barlow.training.loss import ablated_loss  # here, so that the peers' workers are forked off without DALI
    from barlow.training.state import Training

    run = Training(replace(p, pretrain=replace(p.pretrain, seed=seed)), CPU)
    epochs = ceil(steps / run.epoch_steps)
    warmup = min(p.pretrain.warmup_epochs, steps / 2 / run.epoch_steps)
    run = Training(replace(p, pretrain=replace(p.pretrain, seed=seed, epochs=epochs, warmup_epochs=warmup)), CPU)
    run.total_steps = steps
    bf16 = model.computes_bf16(p.pretrain.precision, CPU)

    def losses() -> Iterator[Tensor]:
        for view_a, view_b in chain.from_iterable(repeat(run.views)):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                z_a, z_b = run.twins(view_a, view_b)
            loss = ablated_loss(z_a, z_b, p.pretrain.lambd, p.pretrain.ablate)
            run.update(loss)
            run.record(loss, z_a, z_b)
            yield loss.total.detach()

    return Run(run.network.backbone, p.pretrain.batch_size, losses())


def lightly(p: Params, seed: int, steps: int, batch_size: int | None = None) -> Run:
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules.heads import ProjectionHead
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

    images = Pairs([view(p.views.size, gaussian_blur=0.0) for view in (BYOLView1Transform, BYOLView2Transform)])
    batch = min(batch_size or 128, len(images))
    torch.manual_seed(seed)
    backbone = backbone_of(p.model, p.views.size)
    head = ProjectionHead([
        (backbone.dim, 2048, nn.BatchNorm1d(2048), nn.ReLU(inplace=True)),
        (2048, 2048, None, None),
    ])  # fmt: skip
    network = nn.Sequential(backbone, head)
    peak = 0.06 * batch / 128
    optimizer = torch.optim.SGD(network.parameters(), peak, momentum=0.9, weight_decay=5e-4)
    losses = train(
        p, network, images, batch, BarlowTwinsLoss(), optimizer, lambda step: warmup_cosine(step, steps, 0, peak, 0.0)
    )
    return Run(backbone, batch, losses)


def solo_learn(p: Params, seed: int, steps: int, batch_size: int | None = None) -> Run:
    images = Pairs([solo_learn_transform(p.views.size, solarize) for solarize in (0.0, 0.2)])
    batch = min(batch_size or 256, len(images))
    torch.manual_seed(seed)
    backbone = backbone_of(p.model, p.views.size)
    head = nn.Sequential(
        nn.Linear(backbone.dim, 2048),
        nn.BatchNorm1d(2048),
        nn.ReLU(),
        nn.Linear(2048, 2048),
        nn.BatchNorm1d(2048),
        nn.ReLU(),
        nn.Linear(2048, 2048),
    )
    network = nn.Sequential(backbone, head)
    peak = 0.3 * batch / 256
    optimizer = SoloLearnLARS(network.parameters(), peak)
    warmup = min(10 * (len(images) // batch), steps // 10)
    losses = train(
        p, network, images, batch, solo_learn_loss, optimizer, lambda step: solo_learn_rate(step, steps, warmup, peak)
    )
    return Run(backbone, batch, losses)


class Pairs(Dataset):
    """The images of the pretrain shards, each in two views."""

    def __init__(self, views: list[Callable[[Image.Image], Tensor]]) -> None:
        self.samples, self.views = webdataset.Samples(webdataset.tars("pretrain")), views

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        (data,) = self.samples.read(np.array([index]))
        image = Image.open(io.BytesIO(data)).convert("RGB")
        view_a, view_b = (view(image) for view in self.views)
        return view_a, view_b


def train(
    p: Params,
    network: nn.Module,
    images: Pairs,
    batch_size: int,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
) -> Iterator[Tensor]:
    """Yield the loss of each step; batch norm sees one view at a time, as in both peers."""
    network.to(memory_format=torch.channels_last)
    bf16 = model.computes_bf16(p.pretrain.precision, CPU)
    options: dict[str, Any] = {"num_workers": files.cpus(), "multiprocessing_context": "fork"}
    loader = DataLoader(images, batch_size, shuffle=True, drop_last=True, persistent_workers=True, **options)
    for step, (view_a, view_b) in enumerate(chain.from_iterable(repeat(loader))):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z_a, z_b = (network(view.to(memory_format=torch.channels_last)) for view in (view_a, view_b))
        loss = loss_of(z_a.float(), z_b.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def solo_learn_transform(size: int, solarize: float) -> transforms.Compose:
    return transforms.Compose([
        transforms.RandomResizedCrop(size, (0.08, 1.0), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomSolarize(128, solarize),
        transforms.RandomHorizontalFlip(0.5),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip


def solo_learn_loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    """0.1 * (sum_i (1 - C_ii)^2 + 0.0051 * sum_{i != j} C_ij^2), normalised as by batch norm."""
    a, b = (nn.functional.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    c = a.T @ b / len(a)
    diagonal = torch.diagonal(c)
    off_diagonal = c.square().sum() - diagonal.square().sum()
    return 0.1 * ((1 - diagonal).square().sum() + 0.0051 * off_diagonal)


class SoloLearnLARS(torch.optim.SGD):
    """SGD on gradients (g + wd * w) * min(eta * |w| / (|g| + wd * |w|) / lr, 1); biases and norms keep their g."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr, momentum=0.9)

    @torch.no_grad()
    def step(self, eta: float = 0.02, weight_decay: float = 1e-4) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                w_norm, g_norm = w.norm(), w.grad.norm()
                if w.ndim > 1 and w_norm != 0 and g_norm != 0:
                    rate = eta * w_norm / (g_norm + weight_decay * w_norm + 1e-8)
                    w.grad.add_(w, alpha=weight_decay).mul_((rate / group["lr"]).clamp(max=1))
        super().step()


def solo_learn_rate(step: int, steps: int, warmup: int, peak: float, start: float = 3e-5) -> float:
    """The rate rises linearly from `start` to `peak`, then falls along half a cosine to 0."""
    if step < warmup:
        return start + (peak - start) * step / max(warmup - 1, 1)
    return warmup_cosine(step, steps, warmup, peak, 0.0)


RECIPES: dict[str, Callable[[Params, int, int, int | None], Run]] = {
    "ours": ours,
    "lightly": lightly,
    "solo-learn": solo_learn,
}
