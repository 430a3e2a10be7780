"""`barlow preset NAME`: merge presets/NAME.yaml into params.yaml, keep the comments, and print what changed."""

from __future__ import annotations

from pathlib import Path

from barlow.core.errors import UserError
from barlow.settings import editing, strict

FOLDER = Path("presets")


def run(name: str) -> None:
    """Merge a preset into params.yaml, which is written only if the result is valid.

    Raises:
        UserError: there is no such preset, or params.yaml is not valid before or after the merge.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in known:
        raise UserError(f"preset {name!r} is not in {FOLDER}/; there are: {', '.join(known) or 'none'}")
    overlay = strict.read_yaml(FOLDER / f"{name}.yaml")
    if not isinstance(overlay, dict):
        raise UserError(f"{FOLDER / name}.yaml holds no sections of `key: value` lines")
    changes = editing.edit(overlay, f"{FOLDER / name}.yaml")
    print("\n".join(changes) or f"params.yaml already has every value of {name}")
