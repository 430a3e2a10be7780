"""`barlow compare REV`: the run in this folder beside that of a git revision or DVC experiment.

Reads params.yaml, reports/*.json and the curves in reports/pretrain/ of both. Writes reports/compare.html.
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import dvc.api
import yaml

from barlow.core import files, provenance
from barlow.core.errors import UserError
from barlow.experiments import runs
from barlow.reporting import charts, pages
from barlow.settings.params import PARAMS

PAGE = files.REPORTS / "compare.html"
INTERVAL = ("low", "high")
OF_MANY_RUNS = {"claims", "seeds"}  # JSON files that tell of more than the one run


def run(revision: str) -> None:
    """Write the page.

    Raises:
        UserError: there is no such revision, or one of the two has no metrics.
    """
    commit = resolve(revision)
    listed = provenance.git("ls-tree", "--name-only", commit, f"{files.REPORTS}/").splitlines()
    old = {Path(path).stem: runs.read(commit, path) for path in listed if path.endswith(".json")}
    new = {path.stem: files.read_json(path) for path in sorted(files.REPORTS.glob("*.json"))}
    for run, where in ((old, revision), (new, "this folder")):
        if "evaluate" not in run:
            raise UserError(
                f"{where} has no {files.REPORTS}/evaluate.json, so there is nothing to compare; run `dvc repro`"
            )
    drawn, missing = overlaid(commit)
    stages = sorted({*old, *new} - OF_MANY_RUNS)
    page = {
        "name": revision,
        "commit": commit,
        "subject": provenance.git("log", "-1", "--format=%s", commit),
        "revision": provenance.revision(),
        "params": differing(
            yaml.safe_load(provenance.git("show", f"{commit}:./{PARAMS}")), yaml.safe_load(PARAMS.read_text())
        ),
        "metrics": {stage: rows(old.get(stage, {}), new.get(stage, {})) for stage in stages},
        "curves": drawn,
        "missing": missing,
    }
    pages.write(PAGE, "compare.html.j2", page)


def resolve(name: str) -> str:
    """Return the commit of a git revision, or of a DVC experiment by its name."""
    if not provenance.commit():
        raise UserError(f"{name}: this folder is not in a git repository")
    for reference in (name, runs.finished().get(name, "")):
        with suppress(subprocess.CalledProcessError):
            return provenance.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{reference}^{{commit}}")
    raise UserError(f"{name} is no git revision and no DVC experiment; `git log` and `dvc exp show` list them")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names; a list is a leaf."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf for name, part in value.items() for key, leaf in flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }


def differing(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Return (name, old, new) of every param that differs; None where there is none."""
    before, after = flat(old), flat(new)
    pairs = [(key, before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after])]
    return [pair for pair in pairs if pair[1] != pair[2]]


def rows(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each figure of either run with both values and, for numbers, the difference; intervals go with theirs."""
    found = []
    for key in sorted({*old, *new}):
        base, _, end = key.rpartition("_")
        if end in INTERVAL and base in {*old, *new}:
            continue
        sides: list[tuple[Any, Any]] = [(run.get(key), _interval(run, key)) for run in (old, new)]
        (a, first), (b, second) = sides
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
        overlap = first[0] <= second[1] and second[0] <= first[1] if first and second else None
        difference = b - a if numbers else None
        found.append({"key": key, "sides": sides, "difference": difference, "overlap": overlap, "changed": a != b})
    return found


def _interval(run: dict[str, Any], key: str) -> list[float] | None:
    return [run[f"{key}_{end}"] for end in INTERVAL] if all(f"{key}_{end}" in run for end in INTERVAL) else None


def overlaid(commit: str) -> tuple[dict[str, Any], list[str]]:
    """Return the curves of a commit and of this folder, laid out by name, and the names of those that one lacks."""
    drawn, missing = {}, []
    for path in sorted(pages.CURVES.glob("*.tsv")):
        try:
            text = dvc.api.read(str(path), rev=commit)
        except Exception:  # not in the cache, or not yet logged then; DVC raises whatever its storage does
            missing.append(path.stem)
            continue
        both = [pages.curve(text), pages.curve(path.read_text())]
        drawn[path.stem] = charts.curves(both, log=path.stem in pages.LOGARITHMIC)
    return drawn, missing
