"""A list of images in a .csv or .parquet file: which columns it has, and what they mean."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from barlow.core.errors import UserError
from barlow.data.folders import split_of

SYNONYMS = {  # of a column's name, in lower case with _ between words; the first is the column's own name
    "path": ("path", "paths", "file", "files", "filename", "file_name", "filepath", "file_path", "image", "images",
             "image_path", "image_file", "image_name", "img", "img_path"),
    "label": ("label", "labels", "class", "classes", "class_name", "label_name", "category", "target"),
    "split": ("split", "splits", "subset", "set", "partition"),
}  # fmt: skip
# What pandas.read_csv takes for a missing value; the word `none` in lower case is a class.
MISSING = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]
)
NEAR = 0.8  # similarity from which a column's name counts as misspelt


def read(source: Path) -> tuple[dict[str, list[Any]], list[str]]:
    """Return the columns path, split and label of a list, and notes on what was taken for what.

    Blanks around values do not count, except in a path that exists only with them.

    Raises:
        UserError: the file is no table, a column is doubled, missing or misspelt, or a value is not allowed.
    """
    table = _table(source)
    roles = _roles(table.column_names, source)
    try:
        values = {role: table[name].cast(pa.string()).to_pylist() for role, name in roles.items()}
    except pa.ArrowException as error:
        raise UserError(f"ingest.source={source} cannot be read as a table: {' '.join(str(error).split())}") from None
    rows = table.num_rows
    paths = [_path(value, source.parent) for value in values["path"]]
    if rows - len(list(filter(None, paths))):
        raise UserError(
            f"ingest.source={source} has {rows - len(list(filter(None, paths)))} rows without a `path`; fill or remove "
            "them"
        )
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise UserError(f"ingest.source={source} lists {twice[0]} more than once; keep one row per image")
    named = [_value(value) for value in values.get("split", [None] * rows)]
    splits = [value and split_of(value) for value in named]
    for value, split in zip(named, splits, strict=True):
        if value and not split:
            raise UserError(
                f"ingest.source={source}: split={value} is not allowed; it must be pretrain, train, val, test or empty"
            )
    labels = [_value(value) for value in values.get("label", [None] * rows)]
    unused = [name for name in table.column_names if name not in roles.values()]
    taken = [f"{role} from the column {name}" for role, name in roles.items()]
    notes = [", ".join(taken) + (f"; not used: {', '.join(unused)}" if unused else "")]
    missing = Counter(value.strip() for value in values.get("label", []) if value and value.strip() in MISSING - {""})
    if missing:
        notes.append(f"taken for no label: {', '.join(f'{value} {count}' for value, count in missing.items())}")
    return {"path": paths, "split": splits, "label": labels}, notes


def _table(source: Path) -> pa.Table:
    try:
        if source.suffix.lower() != ".csv":
            return pq.ParquetFile(source).read()
        with pyarrow.csv.open_csv(source) as reader:
            names = reader.schema.names
        text = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
        )
        lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
        return pyarrow.csv.read_csv(source, parse_options=lines, convert_options=text)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        hint = "; is it not UTF-8? Save it as CSV UTF-8" if re.search("utf-?8", reason, re.IGNORECASE) else ""
        raise UserError(f"ingest.source={source} cannot be read as a table: {reason}{hint}") from None


def _roles(columns: list[str], source: Path) -> dict[str, str]:
    """Return the name of the column for each of path, label and split that there is."""
    if len(columns) == 1 and (separator := re.search("[;\t|]", columns[0])):
        raise UserError(
            f"ingest.source={source} has one column, {columns[0]!r}: it separates columns with {separator[0]!r}; "
            "separate them with commas"
        )
    normal = {name: re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_") for name in columns}
    known = [name for name in columns if any(normal[name] in synonyms for synonyms in SYNONYMS.values())]
    for name in known:
        same = [other for other in known if normal[other] == normal[name]]
        if len(same) > 1:
            raise UserError(
                f"ingest.source={source} has the column {name.strip()} twice ({', '.join(same)}); remove one"
            )
    roles: dict[str, str] = {}
    for role, synonyms in SYNONYMS.items():
        given = [name for name in known if normal[name] in synonyms]
        exact = [name for name in given if normal[name] == role]
        if len(given) > 1 and not exact:
            raise UserError(
                f"ingest.source={source}: the columns {', '.join(given)} could each be the {role}; rename one to {role}"
            )
        if given:
            roles[role] = (exact or given)[0]
            continue
        near = [name for name in columns if name not in known and _is_near(normal[name], synonyms)]
        if near:
            raise UserError(
                f"ingest.source={source} has no column `{role}`, but the column {near[0]}; rename it to {role} if that "
                "is meant, else to something else"
            )
    if "path" not in roles:
        raise UserError(f"ingest.source={source} has no column `path`, only {', '.join(columns)}; rename one")
    return roles


def _is_near(name: str, synonyms: tuple[str, ...]) -> bool:
    """Tell whether a name is a misspelt synonym, or has one among its words, like class_id."""
    words = set(name.split("_")) & set(synonyms)
    return bool(words or difflib.get_close_matches(name, synonyms[:1], 1, NEAR))


def _value(text: str | None) -> str | None:
    stripped = (text or "").strip()
    return None if stripped in MISSING else stripped


def _path(text: str | None, folder: Path) -> str | None:
    """Return a path without the blanks around it, unless the file exists only with them."""
    stripped = (text or "").strip()
    if not stripped or stripped == text:
        return stripped or None
    return text if (folder / text).exists() and not (folder / stripped).exists() else stripped  # type: ignore[operator]
