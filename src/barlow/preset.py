"""`barlow preset NAME`: merge presets/NAME.yaml into params.yaml, keep the comments, and print what changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from barlow.core import files
from barlow.core.errors import UserError
from barlow.settings import loading, strict

FOLDER = Path("presets")


def run(name: str) -> None:
    """Merge a preset into params.yaml, which is written only if the result is valid.

    Raises:
        UserError: there is no such preset, or params.yaml is not valid before or after the merge.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in known:
        raise UserError(f"preset {name!r} is not in {FOLDER}/; there are: {', '.join(known) or 'none'}")
    loading.load()
    from ruamel.yaml import YAML  # here, since `merge` works without it

    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    document = yaml.load(loading.PARAMS)
    overlay = strict.read_yaml(FOLDER / f"{name}.yaml")
    if not isinstance(overlay, dict):
        raise UserError(f"{FOLDER / name}.yaml holds no sections of `key: value` lines")
    changes = list(merge(document, overlay, ""))
    with files.replacing(loading.PARAMS) as temporary:
        yaml.dump(document, temporary)
        try:
            loading.load(temporary)
        except UserError as error:
            text = str(error).replace(str(temporary), f"with {FOLDER / name}.yaml, {loading.PARAMS}")
            raise UserError(text) from None
    print("\n".join(changes) or f"params.yaml already has every value of {name}")


def merge(document: Any, overlay: dict[str, Any], prefix: str) -> Iterator[str]:
    """Write the values of `overlay` into `document`; yield one line per value that changed."""
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            yield from merge(document[key], value, f"{prefix}{key}.")
        elif document.get(key) != value:
            yield f"{prefix}{key}: {document.get(key)} -> {value}"
            if isinstance(value, list) and isinstance(document.get(key), list):
                document[key][:] = value  # in place: the list keeps its one-line style and its comment
            else:
                document[key] = value
