"""`barlow scan`: write a cheap fingerprint of the source, by which DVC sees that images were added or changed.

Reads `ingest` of params.yaml and the source's list of files. Writes data/source.json.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from barlow.core import files
from barlow.data import manifest, sources
from barlow.settings.params import Params

SOURCE = Path("data/source.json")
# Not the inode and ctime, by which ingest notices a file replaced by one of the same size and time: they differ in
# every copy of the folder, and a copy on another disk must make nothing run again.
HASHED = ("path", "split", "label", "bytes", "mtime_ns")


def run(params: Params) -> None:
    """Write data/source.json, if it changed: the source and a hash of the paths, sizes and times of its files.

    Raises:
        UserError: the source is missing, empty or malformed, or the machine cannot be used.
    """
    p = params.ingest
    sources.require_platform()
    sources.check(p.source)
    fingerprint: dict[str, Any] = {"source": p.source}
    if not manifest.is_made(p.source):
        listing, _ = sources.find(p)
        digest = hashlib.sha256()
        for row in zip(*(listing[name].to_pylist() for name in HASHED), strict=True):
            digest.update(repr(row).encode())
        fingerprint |= {"files": listing.num_rows, "bytes": pc.sum(listing["bytes"]).as_py() or 0}
        fingerprint |= {"listing_sha256": digest.hexdigest()}
    if not SOURCE.exists() or files.read_json(SOURCE) != fingerprint:
        files.write_json(SOURCE, fingerprint)
