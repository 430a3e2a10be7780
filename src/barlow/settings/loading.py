"""Read params.yaml: each value by the schema in `params`, and then the rules between values."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

from barlow.core.errors import UserError
from barlow.settings.params import TIMM, Params
from barlow.settings.strict import build, read_yaml

PARAMS = Path("params.yaml")


def load(path: Path | str = PARAMS) -> Params:
    """Read and check a params file.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown or missing, a value is not allowed, or two values
            contradict each other.
    """
    params: Params = build(Params, read_yaml(path), str(path))
    for key in ("views.crop_area", "views.crop_ratio", "views.blur_sigma", "validate.brightness"):
        low, high = attrgetter(key)(params)
        if low > high:
            raise UserError(f"{path}: {key}=[{low}, {high}] is not in ascending order; write [{high}, {low}]")
    if (held_out := params.ingest.val_fraction + params.ingest.test_fraction) >= 1:
        text = f"ingest.val_fraction + ingest.test_fraction is {held_out:g}, which leaves no images to train on"
        raise UserError(f"{path}: {text}; lower one of them")
    if (m := params.model).arch.startswith(TIMM):
        if m.stem != "imagenet":
            text = f"model.stem={m.stem} is for resnet10 to resnet50, and model.arch={m.arch} has a stem of its own"
            raise UserError(f"{path}: {text}; set model.stem: imagenet")
        if m.zero_init_residual:
            text = f"model.zero_init_residual=true is for resnet10 to resnet50, not for model.arch={m.arch}"
            raise UserError(f"{path}: {text}; set it to false")
    if (p := params.pretrain).warmup_epochs >= p.epochs:
        text = f"pretrain.warmup_epochs={p.warmup_epochs:g} is not below pretrain.epochs={p.epochs}"
        raise UserError(f"{path}: {text}, so the learning rate would never reach its peak; lower it")
    return params
