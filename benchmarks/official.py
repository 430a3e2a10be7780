"""Barlow Twins in the manner of the official code: our own short version, for the benchmarks to compare with.

PIL transforms in two workers, float32, the loss from the whole matrix C, LARS one parameter at a time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from barlow.settings import params


def transform(views: params.Views, view: int) -> transforms.Compose:
    """Return the official transform of view A (0) or B (1), with the settings given."""
    radius = 2 * round(3 * views.blur_sigma[1]) + 1
    return transforms.Compose([
        transforms.RandomResizedCrop(views.size, views.crop_area, views.crop_ratio, InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(views.flip),
        transforms.RandomApply(
            [transforms.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)], views.jitter
        ),
        transforms.RandomGrayscale(views.grayscale),
        transforms.RandomApply([transforms.GaussianBlur(radius, views.blur_sigma)], views.blur[view]),
        transforms.RandomSolarize(128, views.solarize[view]),
        transforms.ToTensor(),
        transforms.Normalize(views.mean, views.std),
    ])  # fmt: skip


class Pairs(Dataset):
    def __init__(self, paths: list[Path], views: params.Views) -> None:
        self.paths, self.transforms = paths, [transform(views, view) for view in (0, 1)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.open(self.paths[index]).convert("RGB")
        return self.transforms[0](image), self.transforms[1](image)


def loader(paths: list[Path], views: params.Views, batch_size: int) -> DataLoader:
    """Return batches from two workers; not forked, since DALI's threads may be running here."""
    return DataLoader(
        Pairs(paths, views), batch_size, True, num_workers=2, drop_last=True, multiprocessing_context="forkserver"
    )


class Loss(nn.Module):
    def __init__(self, dim: int, lambd: float) -> None:
        super().__init__()
        self.bn, self.lambd = nn.BatchNorm1d(dim, affine=False), lambd

    def forward(self, z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
        c = self.bn(z_a).T @ self.bn(z_b)
        c.div_(len(z_a))
        on_diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
        n = len(c)
        off_diagonal = c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().pow_(2).sum()
        return on_diagonal + self.lambd * off_diagonal


class LARS(torch.optim.Optimizer):
    def __init__(self, parameters, lr: float, weight_decay: float, momentum: float = 0.9, eta: float = 0.001) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                update = w.grad
                if w.ndim > 1:
                    update = update.add(w, alpha=group["weight_decay"])
                    w_norm, update_norm = torch.norm(w), torch.norm(update)
                    one = torch.ones_like(w_norm)
                    ratio = torch.where(update_norm > 0, group["eta"] * w_norm / update_norm, one)
                    update = update.mul(torch.where(w_norm > 0, ratio, one))
                state = self.state[w]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(w)
                state["mu"].mul_(group["momentum"]).add_(update)
                w.add_(state["mu"], alpha=-group["lr"])
