"""The content of a run's page in Prefect, from the files that the commands wrote: Markdown, and rows of a table."""

from __future__ import annotations

import csv
from typing import Any

from barlow.core import files
from barlow.core.weights import load_weights
from barlow.data import validation as validate
from barlow.evaluation import tables
from barlow.evaluation.figures import Candidate, build
from barlow.reporting import pictures

QUARANTINED = 50  # paths that are listed
RESULTS = {"Running stage": "ran", "is cached - skipping run": "cached", "didn't change, skipping": "up to date"}


def row(step: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's row of the table: its seconds, and whether it ran, by what DVC printed."""
    printed = "\n".join(step["lines"])
    result = next((word for words, word in RESULTS.items() if words in printed), "done")
    return {"stage": step["name"], "result": result, "seconds": step["seconds"]}


def validation() -> str | None:
    """Return the checks' results and the first quarantined images by path; None before the stage ran."""
    if not files.VALIDATION.exists():
        return None
    data = validate.read()
    counts = f"{data.accepted.total:,} of {data.images:,} images accepted, {data.quarantined.total:,} in quarantine"
    lines = [counts, "", "| check | | found | bound | severity |", "|---|---|---|---|---|"]
    for name, check in data.checks.items():
        result = "ok" if check.success else "**failed**"
        lines.append(f"| {name} | {result} | {check.observed:g} | {check.bound:g} | {check.severity} |")
    if files.QUARANTINE.exists():
        with files.QUARANTINE.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        lines += ["", f"First {min(len(rows), QUARANTINED)} of {len(rows)} in `{files.QUARANTINE}`:", ""]
        lines += [f"- `{r['path']}`: {r['reason']}" for r in rows[:QUARANTINED]]
    return "\n".join(lines)


def decision(decided: dict[str, Any] | None) -> str | None:
    """Return the decision, its reason, and the figures beside those of production; None if there was no decision."""
    if decided is None:
        return None
    lines = [f"**{decided['decision'].capitalize()}**: {decided['reason']}", ""]
    before = decided["champion"] or "nothing"
    lines += [f"In production: {decided['production'] or 'nothing'} (before: {before}).", ""]
    if decided["figures"]:
        lines.append(tables.columns({name: build(Candidate, each, name) for name, each in decided["figures"].items()}))
    lines += [""] + [
        f"- {'ok' if c['passed'] else '**failed**'} {name}: {c['text']}" for name, c in decided["checks"].items()
    ]
    if decided.get("tags"):
        lines += ["", f"`{decided['tags']}`"]
    return "\n".join(lines)


def report() -> str | None:
    """Return a link to the report, and a picture of the cross-correlation matrix after training."""
    if not files.REPORT.exists():
        return None
    text = f"[{files.REPORT}]({files.REPORT.resolve().as_uri()}) on the worker's disk"
    if not files.CORRELATION.exists():
        return text
    after = load_weights(files.CORRELATION)[0]["after"].numpy()
    address = pictures.matrix(after, -1, 1, pictures.DIVERGING)
    title = "Cross-correlation matrix at the last step"
    return f"{text}\n\n{title}\n\n![{title}]({address})"
