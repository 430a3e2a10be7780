"""`params.yaml` as frozen dataclasses: no defaults, and one clear line for what is unknown, missing or impossible."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml

from barlow.errors import UserError

PARAMS = Path("params.yaml")


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both inclusive."""

    low: float = float("-inf")
    high: float = float("inf")

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"at least {self.low:g}"
        return f"from {self.low:g} to {self.high:g}"


Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Fraction = Annotated[float, Range(0, 1)]
NonNegative = Annotated[float, Range(0)]
Above0 = Annotated[float, Range(1e-12)]
FractionPair = tuple[Fraction, Fraction]
PositivePair = tuple[Above0, Above0]


@dataclass(frozen=True)
class Synthetic:
    """The embedded default data set."""

    seed: Count
    size: Annotated[int, Range(16)]
    unlabelled: Count
    train: Count
    val: Count
    test: Count
    defects: Count


@dataclass(frozen=True)
class Data:
    """The `ingest` stage."""

    source: str
    labels: Literal["folders", "none"]
    val_fraction: Fraction
    test_fraction: Fraction
    max_pixels: Positive
    synthetic: Synthetic


@dataclass(frozen=True)
class Validate:
    """The `validate` stage."""

    min_accepted_fraction: Fraction
    min_decodable_fraction: Fraction
    max_duplicate_fraction: Fraction
    min_side: Positive
    max_side: Positive
    max_bytes: Positive
    modes: tuple[str, ...]
    formats: tuple[str, ...]
    min_images_per_class: Count
    brightness: tuple[NonNegative, NonNegative]
    min_contrast: NonNegative
    max_drift: Fraction


@dataclass(frozen=True)
class Shard:
    """The `shard` stage."""

    seed: Count
    max_bytes: Positive
    max_side: Positive | None


@dataclass(frozen=True)
class Views:
    """The two distortions of each image; a pair of probabilities is [view A, view B]."""

    size: Annotated[int, Range(8)]
    crop_area: tuple[Annotated[float, Range(1e-3, 1)], Annotated[float, Range(1e-3, 1)]]
    crop_ratio: PositivePair
    flip: Fraction
    jitter: Fraction
    brightness: Fraction
    contrast: Fraction
    saturation: Fraction
    hue: Annotated[float, Range(0, 0.5)]
    grayscale: Fraction
    blur: FractionPair
    blur_sigma: PositivePair
    solarize: FractionPair
    mean: tuple[float, float, float]
    std: tuple[Above0, Above0, Above0]


@dataclass(frozen=True)
class Model:
    """The network: backbone and projector."""

    arch: Literal["resnet10", "resnet18", "resnet34", "resnet50"]
    stem: Literal["imagenet", "small", "stride"]
    projector: tuple[Positive, ...]


@dataclass(frozen=True)
class Pretrain:
    """The `pretrain` stage."""

    seed: Count
    epochs: Positive
    batch_size: Annotated[int, Range(2)]
    lambd: NonNegative
    lr_weights: NonNegative
    lr_biases: NonNegative
    final_lr: Fraction
    warmup_epochs: NonNegative
    momentum: Fraction
    weight_decay: NonNegative
    trust_coefficient: Above0
    precision: Literal["bf16", "fp32", "auto"]
    device: Literal["cpu", "cuda", "auto"]
    processes: Positive | None
    compile: bool
    checkpoint_seconds: NonNegative
    checkpoint_steps: Positive | None
    knn_epochs: Positive | None
    min_std: Fraction
    max_correlation: Fraction


@dataclass(frozen=True)
class Evaluate:
    """The `evaluate` stage."""

    seed: Count
    knn_k: Positive
    knn_temperature: Above0
    probe_l2: tuple[NonNegative, ...]


@dataclass(frozen=True)
class Export:
    """The `export` stage."""

    opset: Annotated[int, Range(18, 23)]
    parity_images: Annotated[int, Range(3)]
    min_cosine: Fraction


@dataclass(frozen=True)
class Report:
    """The `report` stage."""

    images: Positive


@dataclass(frozen=True)
class Params:
    """The whole of `params.yaml`."""

    data: Data
    validate: Validate
    shard: Shard
    views: Views
    model: Model
    pretrain: Pretrain
    evaluate: Evaluate
    export: Export
    report: Report


def load(path: Path | str = PARAMS) -> Params:
    """Read and check a params file.

    Raises:
        UserError: the file is missing or not YAML, or a key is unknown, missing or has an impossible value.
    """
    params: Params = build(Params, read_yaml(path), str(path))
    for key, (low, high) in {
        "views.crop_area": params.views.crop_area,
        "views.crop_ratio": params.views.crop_ratio,
        "views.blur_sigma": params.views.blur_sigma,
        "validate.brightness": params.validate.brightness,
    }.items():
        if low > high:
            raise UserError(f"{path}: {key}=[{low}, {high}] is not in ascending order; write [{high}, {low}]")
    if params.data.val_fraction + params.data.test_fraction >= 1:
        total = params.data.val_fraction + params.data.test_fraction
        raise UserError(f"{path}: data.val_fraction + data.test_fraction is {total:g}; leave some images to train on")
    return params


def read_yaml(path: Path | str) -> Any:
    """Parse a YAML file; a missing or malformed one is a UserError that names it."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run from the project's root, where params.yaml lies") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def build(kind: Any, value: Any, file: str, key: str = "") -> Any:
    """Check `value` against the annotation `kind` and return it as that type; `key` is its dotted name."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_section(kind, value, file, key)
    if origin is Annotated:
        number = build(arguments[0], value, file, key)
        bounds = arguments[1]
        _require(bounds.low <= number <= bounds.high, file, key, value, str(bounds))
        return number
    if origin is Literal:
        close = difflib.get_close_matches(str(value), arguments, 1, 0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        _require(value in arguments, file, key, value, f"one of {', '.join(arguments)}{hint}")
        return value
    if origin is tuple:
        count = None if arguments[-1] is Ellipsis else len(arguments)
        wanted = f"a list of {count} values" if count else "a list of at least one value"
        _require(isinstance(value, list) and len(value) == (count or max(len(value), 1)), file, key, value, wanted)
        kinds = arguments if count else arguments[:1] * len(value)
        return tuple(build(k, v, file, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin in (Union, types.UnionType):  # only `X | None`
        return None if value is None else build(arguments[0], value, file, key)
    checks: dict[Any, tuple[Callable[[Any], bool], str]] = {
        int: (lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"),
        float: (lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v == v, "a number"),
        bool: (lambda v: isinstance(v, bool), "true or false"),
        str: (lambda v: isinstance(v, str) and v != "", "a text"),
    }
    check, wanted = checks[kind]
    _require(check(value), file, key, value, wanted)
    return kind(value)


def _build_section(kind: Any, value: Any, file: str, key: str) -> Any:
    prefix = f"{key}." if key else ""
    _require(isinstance(value, dict), file, key or "the file", value, "a section of `key: value` lines")
    hints = typing.get_type_hints(kind, include_extras=True)
    for name in value:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, 1, 0.0)[0]
            raise UserError(
                f"{file}: {prefix}{name}={value[name]!r} is not a known key; the nearest is {prefix}{close}"
            )
    for name in hints:
        if name not in value:
            raise UserError(f"{file}: {prefix}{name} is missing; {kind.__doc__} Its keys: {', '.join(hints)}")
    return kind(**{name: build(hint, value[name], file, prefix + name) for name, hint in hints.items()})


def _require(fine: bool, file: str, key: str, value: Any, wanted: str) -> None:
    if not fine:
        hint = ""
        if wanted.startswith(("a number", "from", "at least")) and isinstance(value, str):
            hint = " (YAML reads 1e-6 as a text: write 1.0e-6)"
        raise UserError(f"{file}: {key}={value!r} is not allowed; it must be {wanted}{hint}")
