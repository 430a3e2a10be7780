"""The experiments of `barlow claims`: presets/claims/NAME.yaml, what each sets of params.yaml, and its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from barlow.core.errors import UserError
from barlow.settings import strict
from barlow.settings.params import Params
from barlow.settings.strict import Count

FOLDER = Path("presets/claims")


@dataclass(frozen=True)
class Rule:
    """What decides a claim: the differences in accuracy of some points to another, all above or all below a bound."""

    compare: tuple[str, ...]
    against: str
    difference: Literal["above", "below"]
    points: float
    text: str


@dataclass(frozen=True)
class Point:
    """A point of a figure: what it sets besides `base`."""

    label: str
    params: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the points that test it."""

    name: str
    title: str
    claim: str
    x_label: str
    rule: Rule
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Grid:
    """All claims on one data set."""

    data: str
    seeds: tuple[Count, ...]
    base: dict[str, Any]
    claims: tuple[Claim, ...]


def load(preset: str, params: Params) -> Grid:
    """Read presets/claims/PRESET.yaml, which must fit params.yaml.

    Raises:
        UserError: there is no such preset, it is for other data, a key is unknown, missing or has an impossible value,
            here or in a point's params, or two claims or two points of one have the same name.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if preset not in known:
        raise UserError(f"preset {preset!r} is not in {FOLDER}/; there are: {', '.join(known) or 'none'}")
    path = FOLDER / f"{preset}.yaml"
    grid: Grid = strict.build(Grid, strict.read_yaml(path), str(path))
    _require_distinct([claim.name for claim in grid.claims], f"{path}: claims")
    for claim in grid.claims:
        labels = [point.label for point in claim.points]
        _require_distinct(labels, f"{path}: the points of {claim.name}")
        for label in (*claim.rule.compare, claim.rule.against):
            if label not in labels:
                raise UserError(f"{path}: the rule of {claim.name} names {label!r}; its points are {', '.join(labels)}")
        for point in claim.points:
            apply(params, grid.base | point.params, f"{path}: {claim.name}, {point.label}")
    if params.ingest.source != grid.data:
        raise UserError(
            f"{path} is for ingest.source={grid.data}, and params.yaml has {params.ingest.source}; set it, with "
            f"what belongs to it (`barlow preset`), or choose another of {', '.join(known)}"
        )
    return grid


def choose(grid: Grid, names: list[str]) -> list[Claim]:
    """Return the claims of those names, or all where there is none.

    Raises:
        UserError: there is no claim of a name.
    """
    known = {claim.name: claim for claim in grid.claims}
    for name in names:
        if name not in known:
            raise UserError(f"claim {name!r} is not known; there are: {', '.join(known)}")
    return [known[name] for name in known if name in names or not names]


def overrides(grid: Grid, point: Point, seed: int) -> dict[str, Any]:
    """Return all that an experiment sets, by dotted key."""
    return {**grid.base, **point.params, "pretrain.seed": seed}


def apply(params: Params, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return params.yaml, as a document, with other values by dotted key.

    Raises:
        UserError: a key is unknown or a value impossible; names `where`.
    """
    document: dict[str, Any] = json.loads(json.dumps(asdict(params)))
    for key, value in values.items():
        *sections, last = key.split(".")
        inner = document
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    strict.build(Params, document, where)
    return document


def name(preset: str, document: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Name an experiment by all that its stages read: two of the same name would have the same result.

    `document` is what `apply` returns; `inputs` has its `sections` that count, and what else the stages read.
    """
    read = {section: document[section] for section in inputs["sections"]}
    text = json.dumps([read, inputs], sort_keys=True)
    return f"claims-{preset}-{hashlib.sha256(text.encode()).hexdigest()[:10]}-s{document['pretrain']['seed']}"


def _require_distinct(names: list[str], what: str) -> None:
    for each in names:
        if names.count(each) > 1:
            raise UserError(f"{what} have {each!r} twice; rename one")
