"""Build frozen dataclasses from a YAML file: no defaults, and one clear line for each kind of mistake."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml

from barlow.core.errors import UserError


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both inclusive."""

    low: float
    high: float = float("inf")

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"at least {self.low:g}"
        return f"from {self.low:g} to {self.high:g}"


class OneOf:
    """Names that a text may have; a `*` stands for any letters."""

    def __init__(self, *names: str) -> None:
        self.names = names


Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Fraction = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(1e-6, 0.999)]
NonNegative = Annotated[float, Range(0)]
Above0 = Annotated[float, Range(1e-12)]

SCALARS: dict[Any, tuple[Callable[[Any], bool], str]] = {  # by type: the check, and what passes it
    int: (lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"),
    float: (lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v == v, "a number"),
    bool: (lambda v: isinstance(v, bool), "true or false"),
    str: (lambda v: isinstance(v, str) and v != "", "a text that is not empty"),
}

OLD = {  # keys of earlier versions: what to do about each
    "data": "is called ingest now; rename it",
    "pretrain.clip": "is gone; write `optimizer: larc` in place of true, or `optimizer: lars` in place of false",
}


def read_yaml(path: Path | str) -> Any:
    """Parse a YAML file.

    Raises:
        UserError: the file is missing or is not valid YAML.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run from the project's root, where params.yaml lies") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def build(kind: Any, value: Any, file: str, key: str = "") -> Any:
    """Check `value`, as YAML or JSON gives it, against an annotation, and return it as that type.

    Args:
        kind: a dataclass, int, float, bool, str, Any, Literal, Annotated with a Range or OneOf, tuple,
            dict[str, ...] or X | None.
        value: what the file holds; a list becomes a tuple, a section a dataclass or a dict.
        file: the file's name, for messages.
        key: the value's dotted name, for messages; empty for the whole file.

    Raises:
        UserError: a key is unknown or missing, or a value is not allowed.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, file, key)
    if origin is Annotated and typing.get_origin(arguments[0]) is tuple:  # Annotated[tuple[...], "may be empty"]
        return () if value == [] else build(arguments[0], value, file, key)
    if origin is Annotated and isinstance(arguments[1], OneOf):
        return _one_of(arguments[1].names, build(arguments[0], value, file, key), file, key)
    if origin is Annotated:
        number, bounds = build(arguments[0], value, file, key), arguments[1]
        _require(bounds.low <= number <= bounds.high, file, key, value, str(bounds))
        return number
    if origin is Literal:
        return _one_of(arguments, value, file, key)
    if origin is tuple:
        count = None if arguments[-1] is Ellipsis else len(arguments)
        wanted = f"a list of {count} values" if count else "a list of at least one value"
        _require(isinstance(value, list) and len(value) == (count or max(len(value), 1)), file, key, value, wanted)
        kinds = arguments if count else arguments[:1] * len(value)
        return tuple(build(k, v, file, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        _require_section(value, file, key)
        return {name: build(arguments[1], item, file, _dotted(key, name)) for name, item in value.items()}
    if origin in (Union, types.UnionType):  # only `X | None`
        return None if value is None else build(arguments[0], value, file, key)
    check, wanted = SCALARS[kind]
    _require(check(value), file, key, value, wanted)
    return kind(value)


def _build_dataclass(kind: Any, value: Any, file: str, key: str) -> Any:
    _require_section(value, file, key)
    hints = typing.get_type_hints(kind, include_extras=True)
    for name, item in value.items():  # unknown keys first: a misspelt key is missing as well
        if name not in hints:
            nearest = _dotted(key, difflib.get_close_matches(name, hints, 1, 0.0)[0])
            shown = "" if isinstance(item, dict) else f"={item!r}"
            text = OLD.get(_dotted(key, name), f"is not a known key; the nearest is {nearest}")
            raise UserError(f"{file}: {_dotted(key, name)}{shown} {text}")
    for name in hints:
        if name not in value:
            keys = ", ".join(hints)
            raise UserError(f"{file}: {_dotted(key, name)} is missing; the keys of {key or 'the file'} are {keys}")
    return kind(**{name: build(hint, value[name], file, _dotted(key, name)) for name, hint in hints.items()})


def _one_of(names: Sequence[str | int], value: Any, file: str, key: str) -> Any:
    shown = [str(name) for name in names]
    close = difflib.get_close_matches(str(value), shown, 1, 0.5) if isinstance(names[0], str) else []
    hint = f"; did you mean {close[0]}?" if close else ""
    number = any(type(value) is type(name) and value == name for name in names)
    patterns = [name for name in names if isinstance(name, str)]
    passed = number or (isinstance(value, str) and any(fnmatch.fnmatchcase(value, name) for name in patterns))
    _require(passed, file, key, value, f"one of {', '.join(shown)}{hint}")
    return value


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _require_section(value: Any, file: str, key: str) -> None:
    _require(isinstance(value, dict), file, key or "the file", value, "a section of `key: value` lines")
    for name in value:
        _require(isinstance(name, str), file, f"the key {_dotted(key, str(name))}", name, "a text")


def _require(passed: bool, file: str, key: str, value: Any, wanted: str) -> None:
    if passed:
        return
    hint = ""
    if isinstance(value, str) and wanted == "a number":
        hint = " (YAML reads 1e-6 as a text; write 1.0e-6)"
    if isinstance(value, (bool, int, float)) and wanted.startswith("a text"):
        hint = "; put it in quotes"
    raise UserError(f"{file}: {key}={value!r} is not allowed; it must be {wanted}{hint}")
