"""The network: backbone, a projector without biases, and the frozen encoder of evaluation and export."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from barlow.core import files
from barlow.core.bands import PixelFormat
from barlow.core.weights import load_weights
from barlow.settings import params, strict
from barlow.training import distributed
from barlow.training.backbone import backbone

Network = TypeVar("Network", bound=nn.Module)
PROJECTOR = "projector."  # how the names of the projector's tensors begin in the encoder's file
SHRINKAGE = 0.1  # of the mean variance, added to each: directions that hardly vary are noise and are not blown up


def projector(dim: int, sizes: tuple[int, ...]) -> nn.Sequential:
    """Build the projector (paper, section 2.2): linear layers without bias, batch norm and ReLU between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise((dim, *sizes[:-1])):
        layers += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear((dim, *sizes)[-2], sizes[-1], bias=False))


class BarlowTwins(nn.Module):
    """Backbone and projector, the f of the paper's figure 1; both views go through it in one forward pass."""

    def __init__(self, model: params.Model, size: int) -> None:
        super().__init__()
        self.backbone = backbone(model, size)
        self.projector = projector(self.backbone.dim, model.projector)
        self.dim = model.projector[-1]

    def forward(self, view_a: Tensor, view_b: Tensor) -> tuple[Tensor, Tensor]:
        """Turn two views (batch, channels, side, side) into embeddings; batch norm sees one view at a time."""
        return self.projector(self.backbone(view_a)), self.projector(self.backbone(view_b))


class Microbatches(nn.Module):
    """The network with `size` images at a time in its backbone: a large batch in the memory of a small one.

    GradCache (Gao et al., arXiv 2101.06983), by torch's activation checkpointing: of the backbone, no activations are
    kept. When the loss's gradient arrives at a microbatch, it goes through the backbone again. Both passes draw the
    same random numbers. Projector and loss see the whole batch.
    """

    def __init__(self, network: BarlowTwins, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, view_a: Tensor, view_b: Tensor) -> tuple[Tensor, Tensor]:
        """Turn two views (batch, channels, side, side) into embeddings; the backbone's batch norm sees a microbatch."""
        return self._embed(view_a), self._embed(view_b)

    def _embed(self, view: Tensor) -> Tensor:
        parts = []
        for part in torch.split(view, self.size):
            parts.append(checkpoint(self.network.backbone, part, use_reentrant=False, context_fn=self._passes))
            torch.clear_autocast_cache()  # so that the microbatches' gradients add up in float32, not in bf16
        z: Tensor = self.network.projector(torch.cat(parts))
        return z

    def _passes(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._copied_statistics()

    @contextmanager
    def _copied_statistics(self) -> Iterator[None]:
        """Let the second pass update copies of batch norm's running statistics, since the first has updated them.

        The first sees all; the second leaves out what needs no gradient, such as a view behind a stop-gradient.
        """
        modules = self.network.backbone.modules()
        buffers = [(module, *named) for module in modules for named in module.named_buffers(recurse=False)]
        for module, name, buffer in buffers:
            setattr(module, name, buffer.clone())
        try:
            yield
        finally:
            for module, name, buffer in buffers:
                setattr(module, name, buffer)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the global batch, which processes share evenly. (torch's own refuses CPU tensors.)"""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (batch, channels, ...) by statistics of the global batch, in eval mode by the running ones."""
        if not self.training:
            return super().forward(x)
        axes, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        n = x.numel() // self.num_features * distributed.world_size()
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            mean = distributed.all_reduce(wide.sum(axes)) / n
            centred = wide - mean.view(shape)
            variance = distributed.all_reduce(centred.square().sum(axes)) / n
            for buffer, value in {"running_mean": mean, "running_var": variance * n / (n - 1)}.items():
                self.get_buffer(buffer).lerp_(value.detach(), self.momentum or 0.0)
            self.get_buffer("num_batches_tracked").add_(1)
            out = centred * (self.weight * (variance + self.eps).rsqrt()).view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        """Allow any number of dimensions."""


def synchronised(network: Network, device: torch.device) -> Network:
    """Return the network with batch norms over all processes: torch's on a GPU, the class above on the CPU."""
    kind = nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                twin = kind(child.num_features, child.eps, child.momentum).to(child.weight.device)
                twin.load_state_dict(child.state_dict())
                if hasattr(child, "act"):  # timm's BatchNormAct2d
                    twin.drop, twin.act = child.drop, child.act
                    twin.register_forward_hook(lambda norm, _, out: norm.act(norm.drop(out)))
                setattr(parent, name, twin)
    return network


class Whitening(nn.Module):
    """Zero-phase whitening (ZCA; Kessy et al., arXiv 1512.00809): y = (x - mean) @ weight. Before `fit`, y = x.

    weight = (covariance + shrinkage)^(-1/2) is symmetric, so each dimension of y stays close to the same of x.
    Whitened dimensions are uncorrelated and of about one variance, so that no few of them decide a cosine.
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("weight", torch.eye(dim))

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Whiten representations."""
        return (x - self.mean) @ self.weight

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "batch dim"]) -> None:
        """Take mean and covariance of these representations; in float64, on the CPU."""
        wide = x.double().cpu()
        mean = wide.mean(0)
        centred = wide - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(wide))
        shrunk = variances.clamp(min=0) + SHRINKAGE * variances.mean()
        scales = torch.where(shrunk > 0, shrunk.rsqrt(), 0)  # 0 only where all representations are equal
        self.weight.copy_(directions * scales @ directions.T)
        self.mean.copy_(mean)


class FrozenEncoder(nn.Module):
    """What is evaluated, exported and served: uint8 or uint16 images in, the embedding out.

    The embedding is the backbone's representation, whitened where `model.whiten` says so.

    Resize and normalisation are inside, so that nobody who uses the encoder can get them wrong. The whole image is
    resized to `views.size` squared (bilinear, antialiased); no part is cut away.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: params.Model, views: params.Views) -> None:
        super().__init__()
        self.size = views.size
        self.form = form = PixelFormat(model.channels, model.bits)
        self.backbone = backbone(model, views.size)
        self.whitening = Whitening(self.backbone.dim) if model.whiten else nn.Identity()
        self.register_buffer("mean", form.white * torch.tensor(views.mean)[:, None, None], persistent=False)
        self.register_buffer("std", form.white * torch.tensor(views.std)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """Turn images (batch, height, width, channels) into normalised float32 (batch, channels, size, size)."""
        return self.normalise(self.resize(images))

    def resize(self, images: Tensor) -> Tensor:
        """Turn images (batch, height, width, channels) into float32 (batch, channels, size, size) of the same scale."""
        pixels = images.permute(0, 3, 1, 2).float()
        return functional.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)

    def normalise(self, resized: Tensor) -> Tensor:
        """Turn what `resize` returns into values of about zero mean and unit deviation."""
        return (resized - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings of images (batch, height, width, channels), as `form` says: float32 (batch, dim)."""
        embedding: Tensor = self.whitening(self.backbone(self.preprocess(images)))
        return embedding


def computes_bf16(precision: str, device: torch.device) -> bool:
    """Say whether to autocast to bfloat16. `auto` does so where the processor computes bfloat16 without emulation."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # oneDNN, which computes convolutions on CPUs, can be held to an older instruction set: it then emulates bf16.
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    native = any(word in held for word in ("BF16", "FP16", "AMX", "AVX10", "DEFAULT"))
    return native and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_encoder(path: Path = files.ENCODER) -> tuple[FrozenEncoder, dict[str, Any]]:
    """Rebuild the frozen encoder from its file alone, whose metadata carries `model` and `views`; return both.

    Raises:
        UserError: the file is missing, or was written for other settings of the model.
    """
    files.require(path, "pretrain")
    tensors, metadata = load_weights(path)
    model = strict.build(params.Model, metadata["model"], str(path), "model")
    views = strict.build(params.Views, metadata["views"], str(path), "views")
    encoder = FrozenEncoder(model, views)
    encoder.load_state_dict({name: value for name, value in tensors.items() if not name.startswith(PROJECTOR)})
    return encoder, metadata
