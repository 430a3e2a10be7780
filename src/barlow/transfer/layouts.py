"""A trained backbone for other frameworks: state dicts of torchvision and timm, and a folder as Hugging Face has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from barlow.core import files
from barlow.core.bands import PixelFormat
from barlow.core.errors import UserError
from barlow.settings.params import TIMM, Model, Views

CLASSES = 1000  # of torchvision's classifier `fc`
SHARED = ("resnet18", "resnet34", "resnet50")  # the networks that torchvision and timm have under the same names

CARD = """\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags: [barlow-twins, self-supervised]
---
# {name}, pretrained by Barlow Twins on images without labels

Made by barlow {version} from {epochs} epochs over images with the data hash {data}. It has no classifier: the output is
the pooled representation of {dim} numbers. Images have {channels} channels, with values from 0 to {white}, which are
scaled to 0 to 1. They are resized to {size} x {size} px (bilinear), and normalised by mean {mean} and standard
deviation {std}. What barlow itself serves is this representation {whitened}.

```python
import timm

network = timm.create_model("local-dir:THIS_FOLDER", pretrained=True, num_classes=0)
```

To share it: `huggingface-cli upload YOUR_NAME/THIS_NAME THIS_FOLDER`, after which its name for timm is
`hf-hub:YOUR_NAME/THIS_NAME`.
"""


def of_torchvision(backbone: nn.Module, model: Model) -> dict[str, Tensor]:
    """Return what `torchvision.models.resnet18().load_state_dict` takes; the classifier `fc`, 1000 classes, is 0.

    Raises:
        UserError: torchvision has no such network.
    """
    _require(model, "torchvision", "")
    if model.channels != 3:
        raise UserError(
            f"torchvision's {model.arch} takes 3 channels, not model.channels={model.channels}; write --format timm, "
            "whose networks take any number, or --format safetensors"
        )
    tensors = {**backbone.state_dict()}
    tensors["fc.weight"] = torch.zeros(CLASSES, int(backbone.dim))  # type: ignore[arg-type]
    tensors["fc.bias"] = torch.zeros(CLASSES)
    return tensors


def of_timm(backbone: nn.Module, model: Model) -> Any:
    """Return timm's model, without a classifier, with these weights.

    Raises:
        UserError: timm has no such network.
    """
    import timm  # here, since its import takes seconds

    _require(model, "timm", f", or model.arch: {TIMM}NAME")
    if model.arch.startswith(TIMM):
        return backbone
    network = timm.create_model(model.arch, num_classes=0, in_chans=model.channels)
    network.load_state_dict(backbone.state_dict())
    return network


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict, whole or not at all: .safetensors, or else as torch.save does, plain tensors alone."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with files.replacing(path) as temporary:
        if path.suffix == ".safetensors":
            temporary.write_bytes(save(plain))
        else:
            torch.save(plain, temporary)


def write_folder(folder: Path, network: Any, model: Model, views: Views, about: Mapping[str, Any]) -> None:
    """Write model.safetensors, config.json in timm's format and README.md, the model card."""
    from timm.models import _hub

    size = (model.channels, views.size, views.size)
    mean, std = (values * model.channels if len(values) == 1 else values for values in (views.mean, views.std))
    data: dict[str, Any] = {"input_size": size, "test_input_size": size, "mean": mean, "std": std}
    data |= {"interpolation": "bilinear", "crop_pct": 1.0, "test_crop_pct": 1.0, "crop_mode": "squash"}
    write(folder / "model.safetensors", network.state_dict())
    with files.replacing(folder / "config.json") as temporary:
        _hub.save_config_for_hf(network, temporary, {"pretrained_cfg": data}, {"in_chans": model.channels})
    with files.replacing(folder / "README.md") as temporary:
        shown = {"size": views.size, "mean": [*mean], "std": [*std], "dim": network.num_features}
        shown |= {"channels": model.channels, "white": PixelFormat(model.channels, model.bits).white}
        temporary.write_text(CARD.format(**shown, **about), encoding="utf-8")


def _require(model: Model, library: str, also: str) -> None:
    theirs = model.arch in SHARED and model.stem == "imagenet"
    if theirs or (also and model.arch.startswith(TIMM)):
        return
    raise UserError(
        f"{library} has no network of model.arch={model.arch} with model.stem={model.stem}; train one with model.arch: "
        f"{' or '.join(SHARED)} and model.stem: imagenet{also}, or write --format safetensors"
    )
