"""`barlow ingest`: decode every image of `ingest.source` once and write the manifest, one row per file.

Reads `ingest` of params.yaml and the source. Writes data/manifest.parquet and data/raw, which holds images only if
ingest makes or downloads them. Thanks to a cache, data/.ingest.parquet, the next run decodes only new or changed files.
`barlow scan` tells DVC that the source has changed.
"""

from __future__ import annotations

import signal
import sys
from contextlib import closing

import pyarrow as pa
import pyarrow.compute as pc

from barlow.core.bands import PixelFormat
from barlow.core.errors import Interrupted, UserError
from barlow.core.tiff import MISMATCH
from barlow.data import cache, facts, manifest, overview, sources
from barlow.data.facts import FACTS
from barlow.settings.params import Ingest, Params


def run(params: Params) -> None:
    """Run the stage.

    Raises:
        UserError: the source or the machine cannot be used.
        Interrupted: SIGTERM or SIGINT came.
    """
    sources.require_platform()
    p, form = params.ingest, PixelFormat(params.model.channels, params.model.bits)
    sources.prepare(p)
    listing, notes = sources.find(p)
    for note in notes:
        print(f"{p.source}: {note}")

    cached = listing.join(cache.read(p, form), cache.KEY, join_type="inner")
    new = listing.join(cached.select(cache.KEY), cache.KEY, join_type="left anti").sort_by("path")
    table = pa.concat_tables([cached, _read(new, cached, p, form)])
    _check_channels(table, p)
    table = _set(table, "label", _labels(table, p))
    table = _set(table, "split", _splits(table, p))
    manifest.write(table)
    lost = table["sha256"].null_count  # missing or unreadable files, which every run tries again
    unreadable = f", {lost} unreadable" if lost else ""
    print(f"{table.num_rows} images: {new.num_rows - lost} new or changed, {cached.num_rows} cached{unreadable}")
    print("\n".join(overview.table(table)))
    for warning in overview.warnings(table, pc.unique(listing["split"].drop_null()).to_pylist(), p):
        print(warning, file=sys.stderr)
    failed = table.num_rows - table["error"].null_count
    if failed:
        print(f"{failed} could not be decoded; `barlow validate` puts them in quarantine")


def _read(new: pa.Table, cached: pa.Table, p: Ingest, form: PixelFormat) -> pa.Table:
    """Read the new files and return them with their facts; write the cache, even when interrupted.

    Raises:
        Interrupted: SIGTERM or SIGINT came; the next run goes on from there.
    """
    batches: list[pa.RecordBatch] = []
    on_term = signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
    try:
        with closing(facts.read_all(manifest.root(p), new["path"].to_pylist(), p.max_pixels, form)) as reading:
            for batch in reading:
                batches.append(batch)
    except KeyboardInterrupt:
        done = sum(batch.num_rows for batch in batches)
        raise Interrupted(f"{done} of {new.num_rows} new images were read; run again to go on from there") from None
    finally:
        signal.signal(signal.SIGTERM, on_term)
        read = pa.Table.from_batches(batches, FACTS)
        rows = new.slice(0, read.num_rows)
        for name in FACTS.names:
            rows = rows.append_column(FACTS.field(name), read[name])
        cache.write(pa.concat_tables([cached.select(rows.column_names), rows]), p, form)
    return rows.select(cached.column_names)


def _check_channels(table: pa.Table, p: Ingest) -> None:
    """Raise UserError if there are images, and none has `model.channels`."""
    other = table.filter(pc.fill_null(pc.match_substring(table["error"], MISMATCH), False))
    if other.num_rows and not pc.any(pc.is_null(table["error"])).as_py():
        first = other.slice(0, 1).to_pylist()[0]
        text = f"no image of ingest.source={p.source} can be used: {first['path']} has {first['error']}"
        raise UserError(f"{text}; set model.channels to what the images have")


def _set(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def _labels(table: pa.Table, p: Ingest) -> pa.Array:
    """Return the source's labels; nulls if `ingest.labels` says so or if there is only one class."""
    classes = pc.unique(table["label"].filter(table["error"].is_null()).drop_null())
    if p.labels != "none" and len(classes) >= 2:
        return table["label"]
    if p.labels != "none" and len(classes) == 1:
        print(f"{p.source}: every label is {classes[0]}, so they are dropped")
    return pa.nulls(table.num_rows, pa.string())


def _splits(table: pa.Table, p: Ingest) -> pa.Array:
    """Return each image's split: the source's, else by a hash of the content; a missing `val` is drawn from `train`."""
    digests = table["sha256"].fill_null("f" * 64).to_pylist()
    named, unlabelled = table["split"].combine_chunks(), table["label"].combine_chunks().is_null()
    drawn = pa.array(manifest.hash_split(digests, p.val_fraction, p.test_fraction), pa.string())
    train_or_val = pa.array(manifest.hash_split(digests, p.val_fraction, 0), pa.string())
    no_val = not pc.any(pc.equal(named, "val")).as_py()
    split = pc.coalesce(pc.if_else(pc.and_(pc.equal(named, "train"), no_val), train_or_val, named), drawn)
    return pc.if_else(pc.and_(pc.equal(split, "train"), unlabelled), "pretrain", split)
