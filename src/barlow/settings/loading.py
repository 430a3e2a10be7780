"""Read params.yaml: each value by the schema in `params`, and then the rules between values."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

from barlow.core import files
from barlow.core.errors import UserError
from barlow.settings.params import TIMM, Params, Pretrain
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
    if m.weights is not None and Path(m.weights).expanduser().absolute() == files.ENCODER.absolute():
        text = f"model.weights={m.weights} is what pretrain writes, and DVC deletes it before pretrain runs"
        remedy = f"copy it, cp {files.ENCODER} data/start.safetensors, and set model.weights to the copy"
        raise UserError(f"{path}: {text}; {remedy} (`dvc checkout {files.ENCODER}` brings it back)")
    _check_channels(params, f"{path}: ")
    if (p := params.pretrain).warmup_epochs >= p.epochs:
        text = f"pretrain.warmup_epochs={p.warmup_epochs:g} is not below pretrain.epochs={p.epochs}"
        raise UserError(f"{path}: {text}, so the learning rate would never reach its peak; lower it")
    if p.optimizer == "adamw" and p.momentum == 1:
        text = "pretrain.momentum=1, which is beta1 of pretrain.optimizer=adamw, must be below 1"
        raise UserError(f"{path}: {text}; 0.9 is usual")
    check_microbatch(p, p.processes or 1, f"{path}: ")
    return params


def _check_channels(params: Params, prefix: str) -> None:
    """Check what depends on the number of channels."""
    channels, views = params.model.channels, params.views
    for key, values in (("views.mean", views.mean), ("views.std", views.std)):
        if len(values) not in (1, channels):
            text = f"{key} has {len(values)} values, and the images have model.channels={channels}"
            raise UserError(f"{prefix}{text}; give one value for all, such as [0.5], or one per channel")
    coloured = [name for name in ("saturation", "hue", "grayscale") if getattr(views, name)]
    if channels != 3 and coloured:
        keys = ", ".join(f"views.{name}={getattr(views, name):g}" for name in coloured)
        raise UserError(
            f"{prefix}{keys}: needs three channels, and the images have model.channels={channels}; set to 0"
        )


def check_microbatch(p: Pretrain, processes: int, prefix: str = "") -> None:
    """Check that a process's part of the batch is a whole number of microbatches.

    Raises:
        UserError: it is not; names the largest microbatch that would do.
    """
    local, size = p.batch_size // processes, p.microbatch
    if size is None or local % size == 0 or p.batch_size % processes:  # the last is told elsewhere
        return
    fault = "is more than" if size > local else "does not divide"
    smaller = [n for n in range(2, min(size, local)) if local % n == 0]
    remedy = f"set it to {smaller[-1]}, or to null" if smaller else "set it to null"
    raise UserError(
        f"{prefix}pretrain.microbatch={size} {fault} the {local} images that a process has of a batch "
        f"(pretrain.batch_size={p.batch_size}, {processes} process(es)); {remedy}"
    )
