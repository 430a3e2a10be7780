"""reports/validate.json as a frozen dataclass."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from barlow.core import files
from barlow.settings import strict


@dataclass(frozen=True)
class Counts:
    """A number of images and its parts."""

    total: int
    by: dict[str, int]


@dataclass(frozen=True)
class Check:
    """What one expectation found."""

    success: bool
    severity: str  # "critical" or "warning"
    observed: float
    bound: float
    unexpected: int  # rows


@dataclass(frozen=True)
class Validation:
    """reports/validate.json; `images` is `accepted` and `quarantined` together, unless the schema check failed."""

    images: int
    accepted: Counts  # by split
    quarantined: Counts  # by the kind of the first reason
    checks: dict[str, Check]  # by the expectation's name


def read() -> Validation:
    """Read reports/validate.json.

    Raises:
        FileNotFoundError: there is none.
        UserError: its keys are other ones; the message names the key.
    """
    validation: Validation = strict.build(Validation, files.read_json(files.VALIDATION), str(files.VALIDATION))
    return validation


def write(validation: Validation) -> None:
    """Write reports/validate.json."""
    files.write_json(files.VALIDATION, asdict(validation))
