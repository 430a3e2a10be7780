"""Change values in params.yaml: the comments stay, and the file is written only if it is valid afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from barlow.core import files
from barlow.core.errors import UserError
from barlow.settings import loading

NOTE = "# recommended "  # begins a line above a setting that says why it has its value


def edit(overlay: Mapping[str, Any], blame: str, notes: Mapping[str, str] | None = None) -> list[str]:
    """Merge sections of values into params.yaml; return one line per value that changed.

    `notes` are put on lines above settings, by dotted key: the value and why. A setting in `overlay` loses an old note.

    Raises:
        UserError: params.yaml is not valid before or after; in the second case the message begins with `blame`.
    """
    loading.load()
    from ruamel.yaml import YAML  # here, since `merge` works without it

    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    # PyYAML, which reads the file, takes 1e-06 for a text, and 1.0e-06 for a number
    yaml.representer.add_representer(
        float, lambda to, v: to.represent_scalar("tag:yaml.org,2002:float", re.sub(r"^(-?\d+)e", r"\1.0e", repr(v)))
    )
    document = yaml.load(loading.PARAMS)
    before = _notes(loading.PARAMS.read_text(encoding="utf-8").splitlines(), document)
    changes = dict(merge(document, overlay))
    with files.replacing(loading.PARAMS) as temporary:
        yaml.dump(document, temporary)
        try:
            loading.load(temporary)
        except UserError as error:
            text = str(error).replace(str(temporary), f"with {blame}, {loading.PARAMS}")
            raise UserError(text) from None
        above = {key: note for key, note in before.items() if key not in set(_keys(overlay))} | dict(notes or {})
        bare = [line for line in temporary.read_text(encoding="utf-8").splitlines() if not _is_note(line)]
        temporary.write_text("\n".join(_annotated(bare, yaml.load("\n".join(bare)), above)) + "\n", encoding="utf-8")
    return [f"{key}: {change}" for key, change in changes.items()]


def merge(document: Any, overlay: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Write the values of `overlay` into `document`; yield (dotted key, "old -> new") of each value that changed."""
    for key, value in overlay.items():
        if isinstance(value, Mapping) and isinstance(document.get(key), dict):
            yield from merge(document[key], value, f"{prefix}{key}.")
        elif document.get(key) != value:
            yield f"{prefix}{key}", f"{document.get(key)} -> {value}"
            if isinstance(value, list) and isinstance(document.get(key), list):
                document[key][:] = value  # in place: the list keeps its one-line style and its comment
            else:
                document[key] = value


def nested(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return values by dotted key as sections of values, as params.yaml has them."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


def _keys(sections: Mapping[str, Any]) -> Iterator[str]:
    for section, values in sections.items():
        yield from (f"{section}.{name}" for name in values or {})


def _is_note(line: str) -> bool:
    return line.lstrip().startswith(NOTE)


def _places(document: Any) -> dict[str, int]:
    """Return the line of each setting of a section, counted from 0, by dotted key."""
    places = {key: key.split(".", 1) for key in _keys(document)}
    return {key: document[section].lc.key(name)[0] for key, (section, name) in places.items()}


def _notes(lines: list[str], document: Any) -> dict[str, str]:
    """Return the note above each setting that has one, by dotted key."""
    return {
        key: lines[line - 1].partition(NOTE)[2]
        for key, line in _places(document).items()
        if line and _is_note(lines[line - 1])
    }


def _annotated(lines: list[str], document: Any, notes: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of params.yaml with the notes above their settings."""
    above = {line: notes[key] for key, line in _places(document).items() if key in notes}
    for number, line in enumerate(lines):
        if number in above:
            yield f"{re.match(' *', line)[0]}{NOTE}{above[number]}"  # type: ignore[index]
        yield line
