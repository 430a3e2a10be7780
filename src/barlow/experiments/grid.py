"""The experiments of `barlow claims`: what presets/claims/NAME.yaml lists, the params of each, and each one's name."""

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
    """How a claim is decided.

    The accuracy of each point in `compare`, minus that of the point `against`, must be above (or below) `points`.
    """

    compare: tuple[str, ...]
    against: str
    difference: Literal["above", "below"]
    points: float
    text: str


@dataclass(frozen=True)
class Point:
    """A point of a claim's figure, and the params that it sets in addition to `Grid.base`."""

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
        UserError: there is no such preset; it is for other data; a key is unknown, missing or not allowed, in the
            preset or in a point's params; or two claims, or two points of one claim, have the same name.
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
            f"{path} is for ingest.source={grid.data}, and params.yaml has {params.ingest.source}; set it and the "
            f"settings that suit it (`barlow preset`), or choose another preset: {', '.join(known)}"
        )
    return grid


def choose(grid: Grid, names: list[str]) -> list[Claim]:
    """Return the claims with these names, in the grid's order; all claims if `names` is empty.

    Raises:
        UserError: no claim has one of the names.
    """
    known = {claim.name: claim for claim in grid.claims}
    for name in names:
        if name not in known:
            raise UserError(f"claim {name!r} is not known; there are: {', '.join(known)}")
    return [known[name] for name in known if name in names or not names]


def overrides(grid: Grid, point: Point, seed: int) -> dict[str, Any]:
    """Return every param that an experiment sets, by dotted key."""
    return {**grid.base, **point.params, "pretrain.seed": seed}


def apply(params: Params, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the document of params.yaml with `values`, given by dotted key, put in.

    Raises:
        UserError: a key is unknown or a value is not allowed; the message begins with `where`.
    """
    document: dict[str, Any] = json.loads(json.dumps(asdict(params)))  # tuples become lists, as YAML has them
    for key, value in values.items():
        *sections, last = key.split(".")
        inner = document
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    strict.build(Params, document, where)
    return document


def name(prefix: str, document: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Name an experiment, after a prefix, by everything that its stages read: equal names mean equal results.

    `document` is from `apply`, `inputs` from `runs.inputs`. Only the sections in `inputs["sections"]` count.
    """
    read = {section: document[section] for section in inputs["sections"]}
    text = json.dumps([read, inputs], sort_keys=True)
    return f"{prefix}-{hashlib.sha256(text.encode()).hexdigest()[:10]}-s{document['pretrain']['seed']}"


def _require_distinct(names: list[str], where: str) -> None:
    for each in names:
        if names.count(each) > 1:
            raise UserError(f"{where} have {each!r} twice; rename one")
