"""The cache of ingest, data/.ingest.parquet: the facts of each file that was read, so that it is not read again."""

from __future__ import annotations

import json
from pathlib import Path

import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from barlow.core import bands, files, images, tiff
from barlow.core.bands import RGB, PixelFormat
from barlow.data import facts, manifest, sources
from barlow.data.facts import FACTS
from barlow.settings.params import Ingest

PATH = Path("data/.ingest.parquet")
# If these are the same, the file is not read again. Size and time alone would miss a file that another one replaced.
KEY = ["path", "bytes", "mtime_ns", "ctime_ns", "inode"]


def read(p: Ingest, form: PixelFormat = RGB) -> pa.Table:
    """Return the FACTS of earlier runs with their KEY columns; none if the cache is missing, damaged or outdated."""
    empty = pa.schema([*(sources.LISTING.field(name) for name in KEY), *FACTS]).empty_table()
    if not PATH.exists():
        return empty
    try:
        table = pq.read_table(PATH)
    except (OSError, pa.ArrowException):
        print(f"{PATH} is damaged, so every image is read again")
        return empty
    if (table.schema.metadata or {}).get(b"barlow") != _version(p, form) or not table.schema.equals(empty.schema):
        return empty
    return table


def write(table: pa.Table, p: Ingest, form: PixelFormat = RGB) -> None:
    """Write the facts of the files that could be read, whether or not they could be decoded."""
    table = table.filter(table["sha256"].is_valid()).select([*KEY, *FACTS.names])
    with files.replacing(PATH) as temporary:
        pq.write_table(table.replace_schema_metadata({b"barlow": _version(p, form)}), temporary)


def replaced(listing: pa.Table, p: Ingest, form: PixelFormat = RGB) -> dict[str, str]:
    """Return the SHA-256 by path of the files that others of the same size and time have replaced since ingest.

    A file with another inode or change time is suspect, but a copy of the folder or a new owner changes these as well.
    So the content of suspects is compared. Where it is the same, the cache takes the new inode and time.
    """
    cached = read(p, form)
    before = cached.select([*KEY, "sha256"])
    both = listing.select(KEY).join(before, KEY[:3], join_type="inner", right_suffix="_before")
    other = pc.or_(*(pc.not_equal(both[name], both[f"{name}_before"]) for name in KEY[3:]))
    suspects = both.filter(other).to_pylist()
    if not suspects:
        return {}
    print(f"{p.source}: {len(suspects)} files have a new inode or change time; their content is compared with ingest's")
    changed: dict[str, str] = {}
    same: dict[str, tuple[int, int]] = {}
    for row in suspects:
        path = manifest.root(p) / row["path"]
        if path.is_file():  # reading a pipe would block
            digest = files.sha256(path)
            if digest == row["sha256"]:
                same[row["path"]] = row["ctime_ns"], row["inode"]
            else:
                changed[row["path"]] = digest
    if same:
        for i, name in enumerate(KEY[3:]):
            pairs = zip(cached["path"].to_pylist(), cached[name].to_pylist(), strict=True)
            values = [same[path][i] if path in same else value for path, value in pairs]
            index = cached.column_names.index(name)
            cached = cached.set_column(
                index, cached.schema.field(name), [pa.array(values, cached.schema.field(name).type)]
            )
        write(cached, p, form)
    return changed


def _version(p: Ingest, form: PixelFormat) -> bytes:
    """Return what a file's facts depend on besides the file: its folder, some settings and the code."""
    code = [files.sha256(module) for module in (facts.__file__, images.__file__, bands.__file__, tiff.__file__)]
    return json.dumps([str(manifest.root(p).resolve()), p.max_pixels, *form, PIL.__version__, *code]).encode()
