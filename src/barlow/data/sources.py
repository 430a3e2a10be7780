"""The source of images: `prepare` fills data/raw as `ingest.source` asks, and `find` lists the files, unread."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from barlow.core import files
from barlow.core.errors import UserError
from barlow.data import manifest, synthetic, torchvision_sets
from barlow.settings import params

LISTING = pa.schema(
    [
        ("path", pa.string()),  # as in the manifest
        ("split", pa.string()),  # null if the source names none
        ("label", pa.string()),
        ("bytes", pa.int64()),  # null, like mtime_ns, if there is no such file
        ("mtime_ns", pa.int64()),
    ]
)
SPLITS = {"valid": "val", "validation": "val"} | {split: split for split in manifest.SPLITS}
UNLABELLED = ("unlabelled", "unlabeled")
MARKER = files.RAW / ".barlow"  # records what data/raw holds, and that ingest may clear it


def check(source: str) -> None:
    """Raise a UserError unless the source exists or ingest can make or download it."""
    if source == "synthetic":
        return
    if source.startswith("torchvision:"):
        torchvision_sets.check(source)
        return
    path = Path(source).expanduser()
    if not (path.is_dir() or (path.is_file() and manifest.is_table(path))):
        raise UserError(
            f"ingest.source={source} is no source; it must be synthetic, torchvision:NAME, an existing folder, or an "
            "existing .csv or .parquet file with a column `path`"
        )
    raw, path = files.RAW.resolve(), path.resolve()
    if raw in (path, *path.parents) or (path in raw.parents and path.is_dir()):
        raise UserError(
            f"ingest.source={source} overlaps {files.RAW}, which ingest fills and clears; keep your images elsewhere"
        )


def prepare(p: params.Ingest) -> None:
    """Fill data/raw if ingest makes or downloads the source, and empty it for any other source.

    If data/raw holds the images of this source already, they stay.

    Raises:
        UserError: the source cannot be used, or data/raw holds files but no MARKER, so it is the user's own.
    """
    check(p.source)
    files.RAW.mkdir(parents=True, exist_ok=True)
    wanted = ""
    if p.source == "synthetic":
        code = files.sha256(synthetic.__file__)
        wanted = json.dumps({"source": p.source, "code": code} | dataclasses.asdict(p.synthetic))
    elif manifest.is_made(p.source):
        wanted = json.dumps({"source": p.source})
    if MARKER.exists():
        if MARKER.read_text() == wanted:
            return
    elif any(files.RAW.iterdir()):
        raise UserError(
            f"{files.RAW} holds files that ingest did not put there; move them and set ingest.source to where they are"
        )
    MARKER.write_text("unfinished")
    for child in files.RAW.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child != MARKER:
            child.unlink()
    if p.source == "synthetic":
        synthetic.write(files.RAW, p.synthetic)
    elif manifest.is_made(p.source):
        torchvision_sets.write(p.source, files.RAW)
    if wanted:
        MARKER.write_text(wanted)
    else:
        MARKER.unlink()


def find(p: params.Ingest) -> tuple[pa.Table, list[str]]:
    """Return the source's files as LISTING, sorted by path, and notes on what was left out.

    Raises:
        UserError: the source does not exist or is empty, or its table is malformed.
    """
    check(p.source)
    source = Path(p.source).expanduser()
    notes: list[str] = []
    if manifest.is_table(source):
        table = _read_table(source)
    else:
        table, notes = _walk(manifest.root(p))
    if not table.num_rows:
        raise UserError(f"ingest.source={p.source} holds no files{''.join(f' ({note})' for note in notes)}; add images")
    return table.sort_by("path"), notes


def _walk(root: Path) -> tuple[pa.Table, list[str]]:
    """List the files below a folder, except hidden ones.

    Each link to a folder is followed once, and never to a folder that contains the link. So loops of links end.
    """
    columns: dict[str, list[str | int | None]] = {name: [] for name in LISTING.names}
    hidden = loops = 0
    above = frozenset(_identity(folder.stat()) for folder in (root.resolve(), *root.resolve().parents))
    followed: set[tuple[int, int]] = set()
    folders: list[tuple[tuple[str, ...], frozenset[tuple[int, int]]]] = [((), above)]
    for parts, above in folders:  # the loop appends to the list, so it goes level by level
        split, label = _meaning(tuple(_readable(part) for part in parts))
        for name, status, link in _entries(root.joinpath(*parts)):
            if name.startswith("."):
                hidden += name != MARKER.name
            elif status and stat.S_ISDIR(status.st_mode) and name:
                if _identity(status) in above or link in followed:
                    loops += 1
                    continue
                folders.append(((*parts, name), above | {_identity(status)}))
                followed |= {link} if link else set()
            else:
                path = _readable("/".join((*parts, name) if name else parts))
                size, mtime = (status.st_size, status.st_mtime_ns) if status else (None, None)
                for column, value in zip(columns.values(), (path, split, label, size, mtime), strict=True):
                    column.append(value)
    notes = [f"hidden files or folders left out: {hidden}"] if hidden else []
    notes += [f"links not followed, back to a folder above or a second time: {loops}"] if loops else []
    return pa.table(columns, schema=LISTING), notes


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result | None, tuple[int, int] | None]]:
    """Yield the name, the status and, for a link, the identity of the link of each entry, sorted by name.

    The status of a link is that of its target; it is None for a broken link or a file that is gone.

    A folder that cannot be opened yields one entry without a name, so that ingest reports it as a file it cannot read.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield "", None, None
        return
    for entry in entries:
        try:
            link = _identity(entry.stat(follow_symlinks=False)) if entry.is_symlink() else None
            yield entry.name, entry.stat(), link
        except OSError:  # a broken link, a ring of links, a file just removed
            yield entry.name, None, None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _readable(name: str) -> str:
    """Return a file name with the bytes that are not UTF-8 spelled out, like \\xe9."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _meaning(parts: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Return the split and the label by a folder's path: [split/][class/...] or [split/]unlabelled/..."""
    split = SPLITS.get(parts[0].lower()) if parts else None
    rest = parts[1:] if split else parts
    if rest and rest[0].lower() in UNLABELLED:
        return split or "pretrain", None
    return split, rest[0] if rest else None


def _read_table(source: Path) -> pa.Table:
    """Read the list of images in a .csv or .parquet file."""
    names = ("path", "split", "label")
    try:
        if source.suffix.lower() == ".csv":
            text = pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
            )
            lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
            table = pyarrow.csv.read_csv(source, parse_options=lines, convert_options=text)
        else:
            table = pq.read_table(source)
        given = {name: table[name].cast(pa.string()) for name in names if name in table.column_names}
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"ingest.source={source} cannot be read as a table: {' '.join(str(error).split())}") from None
    if "path" not in given:
        raise UserError(
            f"ingest.source={source} has no column `path`, only {', '.join(table.column_names)}; rename one"
        )
    if given["path"].null_count:
        raise UserError(
            f"ingest.source={source} has {given['path'].null_count} rows without a `path`; fill or remove them"
        )
    paths = given["path"].to_pylist()
    if len(set(paths)) < len(paths):
        counts = pc.value_counts(given["path"]).to_pylist()
        twice = next(entry["values"] for entry in counts if entry["counts"] > 1)
        raise UserError(f"ingest.source={source} lists {twice} more than once; keep one row per image")
    splits = pc.utf8_lower(given.get("split", pa.nulls(len(paths), pa.string())))
    unknown = sorted(set(pc.unique(splits).to_pylist()) - {*SPLITS, None})
    if unknown:
        raise UserError(
            f"ingest.source={source}: split={unknown[0]} is not allowed; it must be {', '.join(SPLITS)} or empty"
        )
    statuses = [_status(source.parent / path) for path in paths]
    return pa.table(
        {
            "path": paths,
            "split": [SPLITS.get(split) for split in splits.to_pylist()],
            "label": given.get("label", pa.nulls(len(paths), pa.string())),
            "bytes": [status and status.st_size for status in statuses],
            "mtime_ns": [status and status.st_mtime_ns for status in statuses],
        },
        schema=LISTING,
    )


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None


def require_platform() -> None:
    """Raise a UserError on a machine for which there is no DALI, which makes the views."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise UserError(
            f"training needs Linux on x86-64, this is {platform.system()} on {platform.machine()}: NVIDIA DALI, which "
            "makes the views, is not available here; use such a machine, or WSL 2 or Docker on x86-64"
        )
