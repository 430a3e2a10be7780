"""What a run's page shows, from the files that the commands left; Markdown, and rows of a table."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

from barlow.evaluation import tables

QUARANTINED = 50  # paths that are listed
RESULTS = {"Running stage": "ran", "is cached - skipping run": "cached", "didn't change, skipping": "up to date"}


def row(step: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's line in the table: whether it ran, by what DVC said, and its seconds."""
    said = "\n".join(step["lines"])
    result = next((word for words, word in RESULTS.items() if words in said), "done")
    return {"stage": step["name"], "result": result, "seconds": step["seconds"]}


def validation() -> str | None:
    """Return what the checks found, and the images in quarantine by path; None before the stage ran."""
    path, quarantine = Path("reports/validate.json"), Path("data/quarantine.csv")
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    names = [key.removesuffix("_success") for key in found if key.endswith("_success")]
    lines = [
        f"{found['accepted']:,} of {found['images']:,} images accepted, {found['quarantined']:,} in quarantine",
        "",
    ]
    lines += ["| check | | found | bound | severity |", "|---|---|---|---|---|"]
    for name in names:
        values = [found[f"{name}_{field}"] for field in ("success", "observed", "bound", "severity")]
        lines.append(f"| {name} | {'ok' if values[0] else '**failed**'} | {values[1]} | {values[2]} | {values[3]} |")
    if quarantine.exists():
        with quarantine.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        lines += ["", f"First {min(len(rows), QUARANTINED)} of {len(rows)} in `{quarantine}`:", ""]
        lines += [f"- `{r['path']}`: {r['reason']}" for r in rows[:QUARANTINED]]
    return "\n".join(lines)


def decision(found: dict[str, Any] | None) -> str | None:
    """Return the decision, why, and the figures beside those of production; None where it did not come to one."""
    if found is None:
        return None
    lines = [f"**{found['decision'].capitalize()}**: {found['reason']}", ""]
    lines += [f"In production: {found['production'] or 'nothing'} (before: {found['champion'] or 'nothing'}).", ""]
    if found["figures"]:
        lines.append(tables.columns(found["figures"]))
    lines += [""] + [
        f"- {'ok' if c['passed'] else '**failed**'} {name}: {c['text']}" for name, c in found["checks"].items()
    ]
    if found.get("tags"):
        lines += ["", f"`{found['tags']}`"]
    return "\n".join(lines)


def report() -> str | None:
    """Return a link to the report, and the picture of the cross-correlation after training that it holds."""
    path = Path("reports/index.html")
    if not path.exists():
        return None
    pictures = re.findall(
        r'<img[^>]*src="(data:image/png;base64,[^"]+)"[^>]*alt="([^"]*correlation[^"]*)"', path.read_text()
    )
    text = f"[{path}]({path.resolve().as_uri()}) on the worker's disk"
    return text + "".join(f"\n\n{alt}\n\n![{alt}]({source})" for source, alt in pictures[-1:])
