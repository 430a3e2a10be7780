"""The source of images: `prepare` fills data/raw as `ingest.source` asks, and `find` lists the files, unread."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from itertools import compress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from barlow.core import files
from barlow.core.errors import UserError
from barlow.core.patterns import Patterns
from barlow.core.walk import LeftOut, readable, walk
from barlow.data import folders, lists, manifest, synthetic, torchvision_sets
from barlow.settings import params

LISTING = pa.schema(
    [
        ("path", pa.string()),  # as in the manifest
        ("split", pa.string()),  # null if the source names none
        ("label", pa.string()),
        ("bytes", pa.int64()),  # null, like the rest, if there is no such file
        ("mtime_ns", pa.int64()),
        ("ctime_ns", pa.int64()),
        ("inode", pa.uint64()),
    ]
)
NO_LABEL = pa.scalar(None, pa.string())
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


def identity(p: params.Ingest) -> dict[str, Any]:
    """Return the settings that decide which images there are, as JSON has them; `synthetic` only where it is read."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(p)))  # tuples become lists
    if p.source != "synthetic":
        del settings["synthetic"]
    return settings


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
    """Return the source's image files as LISTING, sorted by path, and notes on what was understood and left out.

    Raises:
        UserError: the source does not exist or is empty, its list is malformed, or its folders or splits are ambiguous.
    """
    check(p.source)
    source = Path(p.source).expanduser()
    table, notes = (_listed if manifest.is_table(source) else _walked)(p)
    if not table.num_rows:
        raise UserError(
            f"ingest.source={p.source} holds no images{''.join(f' ({note})' for note in notes)}; add images"
        )
    labels = pc.if_else(pc.equal(table["split"], "pretrain").fill_null(False), NO_LABEL, table["label"])
    dropped = labels.null_count - table["label"].null_count
    notes += [f"labels of the split pretrain, which has none, left out: {dropped}"] if dropped else []
    table = table.set_column(table.column_names.index("label"), "label", labels)
    if p.labels != "none":
        _require_common_classes(table, p.source)
    table, said = _with_test(table)
    return table.sort_by("path"), notes + said


def _walked(p: params.Ingest) -> tuple[pa.Table, list[str]]:
    """List the images in a folder; the folders' names give splits and labels."""
    root, left_out, chosen = manifest.root(p), LeftOut(), Patterns(p.include, p.exclude)
    images = [
        (tuple(map(readable, file.parts)), file.status)
        for file in walk(root, left_out, keep=MARKER.name)
        if chosen.match(readable("/".join(file.parts)))
    ]
    # The folders of a set that ingest makes or downloads are its own, whatever the user's are.
    labels = "folders" if p.labels == "classes" and manifest.is_made(p.source) else p.labels
    layout = folders.understand({parts[:-1] for parts, _ in images}, p.source, labels)
    meanings = [layout.meanings[parts[:-1]] for parts, _ in images]
    columns: dict[str, Any] = {"path": ["/".join(parts) for parts, _ in images]}
    columns |= {"split": [split for split, _ in meanings], "label": [label for _, label in meanings]}
    return _listing(columns, [status for _, status in images]), layout.notes + left_out.notes() + chosen.notes()


def _listed(p: params.Ingest) -> tuple[pa.Table, list[str]]:
    """List the images that a .csv or .parquet file names, whether or not they exist."""
    source, chosen = Path(p.source).expanduser(), Patterns(p.include, p.exclude)
    columns, notes = lists.read(source)
    kept = [chosen.match(path) for path in columns["path"]]
    columns = {name: list(compress(values, kept)) for name, values in columns.items()}
    return _listing(columns, [_status(source.parent / path) for path in columns["path"]]), notes + chosen.notes()


def _listing(columns: dict[str, Any], statuses: list[os.stat_result | None]) -> pa.Table:
    fields = {"bytes": "st_size", "mtime_ns": "st_mtime_ns", "ctime_ns": "st_ctime_ns", "inode": "st_ino"}
    facts = {name: [status and getattr(status, field) for status in statuses] for name, field in fields.items()}
    return pa.table(columns | facts, schema=LISTING)


def _require_common_classes(table: pa.Table, source: str) -> None:
    """Stop if no class of val or test is one of train: an accuracy would mean nothing, and the labels be wrong."""
    classes = {
        split: set(table["label"].filter(pc.equal(table["split"], split).fill_null(False)).drop_null().to_pylist())
        for split in folders.LABELLED_SPLITS
    }
    for split in ("val", "test"):
        if classes["train"] and classes[split] and not classes["train"] & classes[split]:
            raise UserError(
                f"ingest.source={source}: no class of {split} ({_first(classes[split])}) is one of train "
                f"({_first(classes['train'])}); give both the same classes, {folders.LIST}, or set ingest.labels: none"
            )


def _first(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _with_test(table: pa.Table) -> tuple[pa.Table, list[str]]:
    """Make val the test split if there is no other; ingest then draws a new val from train."""
    named = set(pc.unique(table["split"]).to_pylist())
    drawn = pc.any(pc.and_(pc.is_null(table["split"]), pc.is_valid(table["label"]))).as_py()
    if "test" in named or not {"train", "val"} <= named or drawn:
        return table, []
    val = pc.equal(table["split"], "val").fill_null(False)
    if table["label"].null_count < table.num_rows and not pc.any(table.filter(val)["label"].is_valid()).as_py():
        return table, [
            "val has no labels, so it is not taken as test; leave it out with ingest.exclude, or list labels"
        ]
    splits = pc.if_else(val, "test", table["split"])
    said = "there is val but no test, so val is taken as test, and a new val is drawn from train by ingest.val_fraction"
    return table.set_column(table.column_names.index("split"), "split", splits), [said]


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
