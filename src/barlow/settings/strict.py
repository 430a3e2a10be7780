"""A YAML file as frozen dataclasses: no defaults, one clear line for what is unknown, missing or impossible."""

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

from barlow.core.errors import UserError


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
Share = Annotated[float, Range(1e-6, 0.999)]
NonNegative = Annotated[float, Range(0)]
Above0 = Annotated[float, Range(1e-12)]


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
    if origin is dict:
        _require(isinstance(value, dict), file, key, value, "a section of `key: value` lines")
        if arguments[1] is Any:
            return value
        return {name: build(arguments[1], part, file, f"{key}.{name}".lstrip(".")) for name, part in value.items()}
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
