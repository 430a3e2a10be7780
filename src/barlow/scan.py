"""`barlow scan`: write a cheap fingerprint of what lies outside the project, by which DVC sees that it has changed.

Reads params.yaml, the source's list of files, and given weights. Writes data/source.json (of `ingest.source`),
data/start.json (of `model.weights`) and data/compared.json (of `extract.weights`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from barlow.core import files
from barlow.core.bands import PixelFormat
from barlow.data import cache, manifest, sources
from barlow.settings.params import Params
from barlow.transfer import places

SOURCE = Path("data/source.json")
START = Path("data/start.json")
COMPARED = Path("data/compared.json")
# Not the inode and ctime: they differ in every copy of the folder, and a copy must make nothing run again.
HASHED = ("path", "split", "label", "bytes", "mtime_ns")


def run(params: Params) -> None:
    """Write what has changed of the three files; of the source, a hash of the paths, sizes and times of its files.

    A file that another one of the same size and time has replaced since ingest is named, with its SHA-256. It stays
    named after the next ingest. Else the fingerprint would again be that of the old file, whose manifest DVC may have.

    Raises:
        UserError: the source is missing, empty or malformed, given weights are missing, or the machine cannot be used.
    """
    for path, key, given in (
        (START, "model.weights", [params.model.weights] if params.model.weights else []),
        (COMPARED, "extract.weights", [*params.extract.weights]),
    ):
        prints = [places.fingerprint(weights, key, params.promote.registry) for weights in given]
        if not path.exists() or files.read_json(path) != prints:
            files.write_json(path, prints)
    p = params.ingest
    sources.require_platform()
    sources.check(p.source)
    fingerprint: dict[str, Any] = {"source": p.source}
    before = files.read_json(SOURCE) if SOURCE.exists() else {}
    if not manifest.is_made(p.source):
        listing, _ = sources.find(p)
        digest = hashlib.sha256()
        for row in zip(*(listing[name].to_pylist() for name in HASHED), strict=True):
            digest.update(repr(row).encode())
        fingerprint |= {"files": listing.num_rows, "bytes": pc.sum(listing["bytes"]).as_py() or 0}
        fingerprint |= {"listing_sha256": digest.hexdigest()}
        replaced = before.get("replaced", {}) if before.get("source") == p.source else {}
        replaced |= cache.replaced(listing, p, PixelFormat(params.model.channels, params.model.bits))
        paths = set(listing["path"].to_pylist())
        if replaced := {path: digest for path, digest in replaced.items() if path in paths}:
            fingerprint["replaced"] = replaced
    if before != fingerprint:
        files.write_json(SOURCE, fingerprint)
