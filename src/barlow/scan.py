"""`barlow scan`: a cheap fingerprint of the source, for DVC to see that images were added.

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


def run(params: Params) -> None:
    """Write data/source.json, the source's name and a hash over its files' names, sizes and times, if that changed.

    Raises:
        UserError: as `run` does for a source that is missing, empty or malformed.
    """
    p = params.ingest
    sources.require_platform()
    sources.check(p.source)
    found: dict[str, Any] = {"source": p.source}
    if not manifest.is_made(p.source):
        listing, _ = sources.find(p)
        digest = hashlib.sha256()
        for row in zip(*(listing[name].to_pylist() for name in listing.column_names), strict=True):
            digest.update(repr(row).encode())
        found |= {"files": listing.num_rows, "bytes": pc.sum(listing["bytes"]).as_py() or 0}
        found |= {"listing_sha256": digest.hexdigest()}
    if not SOURCE.exists() or files.read_json(SOURCE) != found:
        files.write_json(SOURCE, found)
