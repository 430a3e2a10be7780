"""`barlow summary`: the headline figures of the last run, and where its report lies."""

from __future__ import annotations

from collections.abc import Mapping

from barlow import files
from barlow.errors import UserError

REPORT = files.REPORTS / "index.html"


def run() -> None:
    """Print reports/evaluate.json as a table.

    Raises:
        UserError: nothing was evaluated yet.
    """
    path = files.REPORTS / "evaluate.json"
    if not path.exists():
        raise UserError(f"{path} is missing; `make repro` or `dvc repro` makes it")
    print(table(files.read_json(path)))
    for what, where in {"encoder": files.ONNX, "report": REPORT}.items():
        print(f"{what:<26}{where if where.exists() else 'not there: run `dvc repro`'}")


def table(metrics: Mapping[str, float]) -> str:
    """Return the headline figures, pretrained against random, as text."""
    lines = [f"{'':<26}{'pretrained':>22}{'random encoder':>22}"]
    for name, text in {"linear_top1": "linear probe, top-1 %", "knn_top1": "weighted kNN, top-1 %"}.items():
        if name in metrics:
            cells = [
                f"{metrics[key]:.1f} ({metrics[f'{key}_low']:.1f} to {metrics[f'{key}_high']:.1f})"
                for key in (name, f"random_{name}")
            ]
            lines.append(f"{text:<26}{cells[0]:>22}{cells[1]:>22}")
    if len(lines) == 1:
        lines.append("no labels in each of train, val and test: only the health of the features can be told")
    for name in ("effective_rank", "alignment", "uniformity"):
        lines.append(f"{name.replace('_', ' '):<26}{metrics[name]:>22.2f}{metrics[f'random_{name}']:>22.2f}")
    return "\n".join(lines)


def columns(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Return figures of several encoders, by name, as a Markdown table: a column an encoder, a row a figure."""
    rows = [f"| | {' | '.join(figures)} |", f"|---|{'---|' * len(figures)}"]
    for key in sorted({key for column in figures.values() for key in column if not key.endswith(("_low", "_high"))}):
        cells = []
        for column in figures.values():
            interval = f" ({column[f'{key}_low']:.1f} to {column[f'{key}_high']:.1f})" if f"{key}_low" in column else ""
            cells.append(f"{column[key]:.4g}{interval}" if key in column else "")
        rows.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(rows)
