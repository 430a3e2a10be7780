"""`barlow compare REV`: show the run in this folder beside that of a git revision or DVC experiment.

Reads params.yaml, reports/*.json and the curves in reports/pretrain/ of both runs. Writes reports/compare.html.
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import dvc.api
import yaml

from barlow.core import files, provenance
from barlow.core.errors import UserError
from barlow.evaluation.figures import document, leaves
from barlow.experiments import runs
from barlow.reporting import charts, pages
from barlow.settings.loading import PARAMS

PAGE = files.REPORTS / "compare.html"
OF_MANY_RUNS = {"claims", "seeds", "tune"}  # JSON files about more than one run


def run(revision: str) -> None:
    """Write the page.

    Raises:
        UserError: there is no such revision, or one of the two has no metrics.
    """
    commit = resolve(revision)
    listed = provenance.git("ls-tree", "--name-only", commit, f"{files.REPORTS}/").splitlines()
    old = {Path(path).stem: runs.read(commit, path) for path in listed if path.endswith(".json")}
    new = {path.stem: document(path) for path in sorted(files.REPORTS.glob("*.json"))}
    for run, where in ((old, revision), (new, "this folder")):
        if "evaluate" not in run:
            raise UserError(
                f"{where} has no {files.REPORTS}/evaluate.json, so there is nothing to compare; run `dvc repro`"
            )
        if "linear_top1" in run["evaluate"]:  # before these files were nested
            raise UserError(f"{where} has metrics of an older shape, which cannot be put side by side with these")
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
    raise UserError(f"{name} is neither a git revision nor a DVC experiment; `git log` and `dvc exp show` list them")


def differing(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Return (name, old, new) of every param that differs; None for a param that one of them lacks."""
    before, after = leaves(old), leaves(new)
    pairs = [(key, before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after])]
    return [pair for pair in pairs if pair[1] != pair[2]]


class Figure(NamedTuple):
    """A leaf of nested metrics, with its 95 % interval if it has one."""

    value: Any
    interval: tuple[float, float] | None


def measured(value: Any, name: str = "") -> dict[str, Figure]:
    """Return each figure of nested metrics by its dotted name; `low` and `high` beside a `top1` are its interval."""
    if not isinstance(value, dict):
        return {name: Figure(value, None)}
    interval = (value["low"], value["high"]) if {"top1", "low", "high"} <= value.keys() else None
    everything: dict[str, Figure] = {}
    for key, part in value.items():
        if interval and key in ("top1", "low", "high"):
            continue
        everything |= measured(part, f"{name}.{key}".lstrip("."))
    return everything | ({f"{name}.top1".lstrip("."): Figure(value["top1"], interval)} if interval else {})


def rows(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every figure of either run: both values, whether they differ and, for numbers, the difference.

    `overlap` says whether the two 95 % intervals do; None unless both runs have one.
    """
    before, after = measured(old), measured(new)
    table = []
    for key in sorted({*before, *after}):
        a, b = (figures.get(key, Figure(None, None)) for figures in (before, after))
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a.value, b.value))
        overlap = None
        if a.interval and b.interval:
            overlap = a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]
        difference = b.value - a.value if numbers else None
        changed = a.value != b.value
        table.append({"key": key, "sides": [a, b], "difference": difference, "overlap": overlap, "changed": changed})
    return table


def overlaid(commit: str) -> tuple[dict[str, Any], list[str]]:
    """Return the curves of a commit and of this folder, laid out by name, and the names of those that one run lacks."""
    drawn, missing = {}, []
    for path in sorted(pages.CURVES.glob("*.tsv")):
        try:
            text = dvc.api.read(str(path), rev=commit)
        except Exception:  # not in the cache, or not logged at that commit; DVC raises whatever its storage raises
            missing.append(path.stem)
            continue
        both = [pages.curve(text), pages.curve(path.read_text())]
        drawn[path.stem] = charts.curves(both, log=path.stem in pages.LOGARITHMIC)
    return drawn, missing
