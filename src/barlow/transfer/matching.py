"""Put given weights into a network: which tensors matched, which were left out, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from barlow.core import files
from barlow.core.errors import UserError
from barlow.settings.params import TIMM, Model, Params
from barlow.transfer import places, reading

LEAST = 0.9  # fraction of the backbone's parameters that must match
TOLD = 4  # tensors that a line names, per reason


class Match(NamedTuple):
    """What of a file fits a network."""

    prefix: str  # of the network's names in the file
    taken: dict[str, Tensor]  # by the network's names, in its dtypes
    left_out: dict[str, str]  # reason by name
    share: float  # of the network's parameters that are taken, 0 to 1


class Loaded(NamedTuple):
    """Weights that a network now has."""

    source: dict[str, str]  # the name and the SHA-256 of the file
    text: str  # what matched


def load(weights: str, key: str, params: Params, backbone: nn.Module, projector: nn.Module | None = None) -> Loaded:
    """Put weights into the backbone and, if the file has one of the same sizes, into the projector.

    Args:
        weights: a path, `registry:v3`, `torchvision:...` or `timm:...`.
        key: the setting that names them, for messages.
        params: the folder of the registry, and the network for messages.
        backbone, projector: changed in place.

    Raises:
        UserError: the weights are not there, damaged, not finite, or fit less than LEAST of the backbone.
    """
    given = f"{key}={weights}"
    path = places.locate(weights, key, params.promote.registry)
    tensors = reading.read(path, given)
    found = match(tensors, backbone)
    parts = [f"{100 * found.share:.1f} % of the backbone's parameters matched"]
    head = dict[str, Tensor]()
    if projector is not None:
        head, text = _head(tensors, found.prefix, projector)
        parts.append(text)
    beside = {f"{_beside(found.prefix)}{name}" for name in head}
    missed = _reasons({name: why for name, why in found.left_out.items() if name not in beside})
    missed += _first_layer(found, params.model)
    if found.share < LEAST:
        raise UserError(
            f"{given}: only {100 * found.share:.1f} % of the parameters of model.arch={params.model.arch} match, and "
            f"at least {100 * LEAST:.0f} % must; is it a file of another architecture? Left out: {missed}"
        )
    for name, value in (*found.taken.items(), *head.items()):
        if not value.isfinite().all():
            raise UserError(f"{given} has a NaN or an infinity in {name}; it is of a training that failed, or damaged")
    backbone.load_state_dict(found.taken, strict=False)
    if projector is not None and head:
        projector.load_state_dict(head)
    text = f"{given}: {', '.join(parts)}" + (f"; left out: {missed}" if missed else "")
    return Loaded({"name": weights, "sha256": files.sha256(path)}, text)


def _beside(prefix: str) -> str | None:
    """Return the prefix of the projector, which lies beside the backbone in our files and the official ones."""
    return f"{prefix.removesuffix('backbone.')}projector." if prefix.endswith("backbone.") else None


def _head(tensors: Mapping[str, Tensor], prefix: str, projector: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of the file's projector, if they fit in whole, and words on that."""
    beside = _beside(prefix)
    names = [name for name in tensors if beside and name.startswith(beside)]
    if not beside or not names:
        return {}, "the projector is new, since the file has none"
    head = {name.removeprefix(beside): tensors[name] for name in names}
    wanted = projector.state_dict()
    if head.keys() != wanted.keys() or any(_fault(head[name], wanted[name]) for name in wanted):
        return {}, "the projector is new, since the file's has other sizes than model.projector"
    return head, "the projector too"


def match(tensors: Mapping[str, Tensor], network: nn.Module) -> Match:
    """Find the network's tensors in a file, whatever prefix their names have there: `module.`, `teacher.backbone.`.

    Of several prefixes the one that fits the most parameters is taken; of equal ones that of a teacher, then the
    shorter one, then the last by the alphabet (MoCo's encoder_q, not encoder_k): every process takes the same.
    """
    wanted = network.state_dict()
    sizes = {name: w.numel() for name, w in network.named_parameters()}

    def fitting(prefix: str) -> int:
        return sum(n for name, n in sizes.items() if _fault(tensors.get(prefix + name), wanted[name]) is None)

    prefixes = {there.removesuffix(name) for there in tensors for name in sizes if there.endswith(name)}
    prefixes = {"", *(each for each in prefixes if each.endswith("."))}
    prefix = max(prefixes, key=lambda each: (fitting(each), "teacher" in each, -len(each), each))
    taken, left_out = dict[str, Tensor](), dict[str, str]()
    for name, value in wanted.items():
        given = _resampled(name, tensors.get(prefix + name), network)
        fault = _fault(given, value)
        if fault is None and given is not None:
            taken[name] = given.to(value.dtype)
        elif fault and (name in sizes or given is not None):  # a buffer that is not there is not worth a word
            left_out[name] = fault
    used = {prefix + name for name in wanted}
    left_out |= {name: "not in the network" for name in tensors if name not in used}
    matched = sum(n for name, n in sizes.items() if name in taken)
    return Match(prefix, taken, left_out, matched / max(sum(sizes.values()), 1))


def _fault(given: Tensor | None, wanted: Tensor) -> str | None:
    """Say why a tensor cannot take the place of another, or return None."""
    if given is None:
        return "not in the file"
    if given.shape != wanted.shape:
        return f"shape {_shape(given)} in the file, {_shape(wanted)} here"
    plain = given.layout == torch.strided and not (given.is_quantized or given.is_meta or given.is_complex())
    floating = given.dtype.is_floating_point and given.itemsize > 1  # a byte is too coarse to go on from
    return None if plain and floating == wanted.dtype.is_floating_point else f"dtype {given.dtype}"


def _resampled(name: str, given: Tensor | None, network: Any) -> Tensor | None:
    """Return the positions of a vision transformer for another image size, as timm does; anything else as it is."""
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    wanted = getattr(network, "pos_embed", None)
    if name != "pos_embed" or given is None or grid is None or wanted is None:
        return given
    if given.ndim != 3 or given.shape == wanted.shape or given.shape[::2] != wanted.shape[::2]:
        return given
    from timm.layers import resample_abs_pos_embed  # here, since its import takes seconds

    prefix = wanted.shape[1] - prod(grid)
    resampled: Tensor = resample_abs_pos_embed(given.float(), [*grid], num_prefix_tokens=prefix)
    return resampled


def _reasons(left_out: Mapping[str, str]) -> str:
    by_reason = dict[str, list[str]]()
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
        lines.append(f"{', '.join(names[:TOLD])}{more} ({reason})")
    return "; ".join(lines)


def _first_layer(found: Match, model: Model) -> str:
    """Say which channels and which stem a ResNet's file has, if others."""
    shape = re.match(r"shape 64x(\d+)x(3x3|7x7) in the file", found.left_out.get("conv1.weight", ""))
    if model.arch.startswith(TIMM) or not shape:
        return ""
    channels, kernel = shape.groups()
    parts = [f"takes model.channels: {channels}, not {model.channels}"] if int(channels) != model.channels else []
    if (kernel == "7x7") != (model.stem == "imagenet"):
        stems = "imagenet" if kernel == "7x7" else "small or stride"
        parts.append(f"is that of model.stem: {stems}, not of {model.stem}")
    return f"; the file's first layer {' and '.join(parts)}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "()"
