"""Fill in the templates/*.j2 beside this module; they escape every value."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from barlow.core import files
from barlow.reporting import charts, pictures

CURVES = files.REPORTS / "pretrain/plots/metrics"  # one TSV file per curve, written by pretrain
LOGARITHMIC = ("loss", "invariance", "redundancy")  # curves on a logarithmic axis; the others are drawn from 0


def write(path: Path, template: str, page: Mapping[str, Any]) -> None:
    """Fill in a template and write the page, whole or not at all."""
    environment = Environment(
        loader=PackageLoader("barlow", "reporting/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"printable": printable, "figure": figure}
    environment.globals |= {"PLOT": charts.PLOT, "TALL": charts.TALL, "DIVERGING": pictures.DIVERGING}
    environment.globals["shape"] = charts.shape
    text = environment.get_template(template).render(page)
    with files.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def printable(text: str) -> str:
    """Escape line ends, marks that turn the reading direction and the like; a file's name may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def figure(value: Any, digits: int = 4) -> str:
    """Format a figure for people: few digits, thousands separated, a true minus."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return (f"{value:,}" if isinstance(value, int) else str(value)).replace("-", "−")


def read_table(path: Path, delimiter: str = ",") -> list[list[str]]:
    """Read the rows of a CSV or TSV file below its header."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file, delimiter=delimiter))[1:]


def curve(text: str) -> list[float]:
    """Return the values of a curve's TSV file, one per epoch."""
    return [float(line.split("\t")[1]) for line in text.splitlines()[1:]]
