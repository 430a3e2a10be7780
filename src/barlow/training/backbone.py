"""The backbone, whose output is the pooled representation: a ResNet of torchvision or any model of timm."""

from __future__ import annotations

import difflib
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from barlow.core.errors import UserError
from barlow.settings import params
from barlow.settings.params import TIMM

LAYERS = {"resnet10": [1, 1, 1, 1], "resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}


class Backbone(nn.Module):
    """The type of what `backbone` returns: (batch, channels, size, size) in, the representation (batch, dim) out."""

    dim: int


def backbone(model: params.Model, size: int) -> Backbone:
    """Build the network of `model.arch` for images of `size` px, with random weights.

    Raises:
        UserError: timm has no model of that name, or the model takes no images of that size.
    """
    return _timm(model.arch, size, model.channels) if model.arch.startswith(TIMM) else _resnet(model)


def _resnet(model: params.Model) -> Backbone:
    """Build a ResNet with a representation of 512 numbers, or 2048 for resnet50.

    Stems: `imagenet` is torchvision's 7x7 stride 2 with max-pool; `small`, 3x3 stride 1 without pool, is usual for
    32-px images (SimCLR, appendix B.9); `stride`, 3x3 stride 2, costs a quarter of `small`.
    """
    block = resnet.Bottleneck if model.arch == "resnet50" else resnet.BasicBlock
    network = resnet.ResNet(block, LAYERS[model.arch], zero_init_residual=model.zero_init_residual)
    if (model.stem, model.channels) != ("imagenet", 3):
        kernel, stride = {"imagenet": (7, 2), "small": (3, 1), "stride": (3, 2)}[model.stem]
        network.conv1 = nn.Conv2d(model.channels, 64, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if model.stem != "imagenet":
        network.maxpool = nn.Identity()
    network.dim = network.fc.in_features
    network.fc = nn.Identity()
    return cast(Backbone, network)


def _timm(arch: str, size: int, channels: int) -> Backbone:
    """Build a model of timm without its classifier: its output is what timm calls the pre-logits."""
    import timm  # here and below, since its import takes seconds

    name, names = arch.removeprefix(TIMM), timm.list_models()
    if name not in names:
        close = difflib.get_close_matches(name, names, 1, 0.0)[0]
        raise UserError(f"model.arch={arch} is not a model of timm {timm.__version__}; the nearest is {TIMM}{close}")
    dim = _dim(name, size)
    if dim is None:
        # Patches have 4, 7, 8, 14, 16 or 32 px, and convolutions halve the side up to five times.
        larger = [other for other in range(size + 1, size + 33) if other % 8 == 0 or other % 14 == 0]
        default = timm.get_pretrained_cfg(name).input_size[-1]
        remedy = next((f"{other} px would do" for other in (*larger, default) if _dim(name, other)), "choose another")
        raise UserError(f"model.arch={arch} takes no images of views.size={size} px; {remedy}")
    network = _created(name, size, channels)
    network.dim = dim
    for module in network.modules():
        # Only the views may be random in training: a run that was stopped and goes on could not repeat anything else.
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
    return network


def _created(name: str, size: int, channels: int = 3) -> Backbone:
    import timm

    sized = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return cast(Backbone, timm.create_model(name, num_classes=0, in_chans=channels, **sized))


def _dim(name: str, size: int) -> int | None:
    """Return the length of the representation; None if the network takes no images of `size` px."""
    import timm

    try:
        with torch.device("meta"), torch.no_grad():  # shapes alone, no numbers
            network = _created(name, size).eval()
            representation: Tensor = network(torch.empty(2, 3, size, size))
    except Exception:  # each network fails in its own way
        return None
    patches = [m.patch_size[0] for m in network.modules() if isinstance(m, timm.layers.PatchEmbed)]
    whole = all(size % side == 0 for side in patches)  # else timm leaves out the pixels that fill no patch
    return representation.shape[1] if whole and representation.ndim == 2 else None
