"""Put given weights into a network: which tensors matched, which were left out, and why."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from barlow.core import files
from barlow.core.errors import UserError
from barlow.settings.params import Model
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


def load(
    weights: str, key: str, registry: str, model: Model, backbone: nn.Module, projector: nn.Module | None = None
) -> Loaded:
    """Put weights into the backbone and, if the file has one of the same sizes, into the projector.

    Args:
        weights: a path, `registry:v3`, `torchvision:...` or `timm:...`.
        key: the setting that names them, for messages.
        registry: the folder of the registry.
        model: the settings of the network, for messages.
        backbone, projector: changed in place.

    Raises:
        UserError: the weights are not there, damaged, not finite, or fit less than LEAST of the backbone.
    """
    given = f"{key}={weights}"
    path = places.locate(weights, key, registry)
    tensors = reading.read(path, given)
    found = match(tensors, backbone)
    parts = [f"{100 * found.share:.1f} % of the backbone's parameters matched"]
    if projector is not None:
        ours = "backbone."  # beside which the projector lies, in our files and the official ones
        head = {}
        if found.prefix.endswith(ours):
            prefix = f"{found.prefix.removesuffix(ours)}projector."
            head = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        fits = match(head, projector)
        whole = fits.share == 1 and {*head} == {*projector.state_dict()}
        why = "the file has none" if not head else "the file's has other sizes than model.projector"
        parts.append("the projector too" if whole else f"the projector is new, since {why}")
        if whole:
            _check_finite(fits.taken, given)
            projector.load_state_dict(fits.taken, strict=False)
    missed = _reasons(found.left_out) + _stem(found, model)
    if found.share < LEAST:
        raise UserError(
            f"{given}: only {100 * found.share:.1f} % of the parameters of model.arch={model.arch} match, and at least "
            f"{100 * LEAST:.0f} % must; is it a file of another architecture? Left out: {missed}"
        )
    _check_finite(found.taken, given)
    backbone.load_state_dict(found.taken, strict=False)
    text = f"{given}: {', '.join(parts)}" + (f"; left out: {missed}" if missed else "")
    return Loaded({"name": weights, "sha256": files.sha256(path)}, text)


def match(tensors: Mapping[str, Tensor], network: nn.Module) -> Match:
    """Find the network's tensors in a file, whatever prefix their names have there: `module.`, `teacher.backbone.`.

    Of several prefixes the one that fits the most parameters is taken; of equal ones that of a teacher.
    """
    wanted = network.state_dict()
    sizes = {name: w.numel() for name, w in network.named_parameters()}

    def fitting(prefix: str) -> int:
        return sum(n for name, n in sizes.items() if _fault(tensors.get(prefix + name), wanted[name]) is None)

    prefixes = {there.removesuffix(name) for there in tensors for name in sizes if there.endswith(name)}
    prefixes = {"", *(each for each in prefixes if each.endswith("."))}
    prefix = max(prefixes, key=lambda each: (fitting(each), "teacher" in each, -len(each)))
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


def _check_finite(taken: Mapping[str, Tensor], given: str) -> None:
    for name, value in taken.items():
        if not value.isfinite().all():
            raise UserError(f"{given} has a NaN or an infinity in {name}; it is of a training that failed, or damaged")


def _reasons(left_out: Mapping[str, str]) -> str:
    by_reason = dict[str, list[str]]()
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
        lines.append(f"{', '.join(names[:TOLD])}{more} ({reason})")
    return "; ".join(lines)


def _stem(found: Match, model: Model) -> str:
    """Say which stem a ResNet's file has, if it is another one."""
    reason = found.left_out.get("conv1.weight", "")
    if model.arch.startswith(places.TIMM) or not reason.startswith("shape"):
        return ""
    stems = "imagenet" if reason.startswith("shape 64x3x7x7") else "small or stride"
    return f"; the file's first layer is that of model.stem: {stems}, not of {model.stem}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "()"
