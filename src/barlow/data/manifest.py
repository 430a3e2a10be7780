"""The manifest: one row per file of the source. The stages after ingest know nothing else about the source."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from barlow.core import files
from barlow.settings import params

SPLITS = ("pretrain", "train", "val", "test")
SCHEMA = pa.schema(
    [
        # posix, relative to root(params.ingest); a table of images may give absolute paths
        pa.field("path", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # one of SPLITS; images of `train` always have a label
        pa.field("label", pa.string()),  # name of the class; null where there is none
        pa.field("width", pa.int32()),  # px, as stored: before the EXIF orientation is applied
        pa.field("height", pa.int32()),
        pa.field("mode", pa.string()),  # mode and format by Pillow's names
        pa.field("format", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),  # of the file, in hex
        pa.field("pixels", pa.int64()),  # `images.digest` of the upright RGB pixels that Pillow decodes
        pa.field("brightness", pa.float64()),  # mean of the grey image, 0 to 255
        pa.field("contrast", pa.float64()),  # its standard deviation
        pa.field("orientation", pa.int8()),  # EXIF, 1 to 8
        pa.field("error", pa.string()),  # why the file could not be decoded; null if it could
    ]
)


def read(path: Path = files.MANIFEST) -> pa.Table:
    """Read the manifest, or its accepted rows from data/accepted.parquet; raises UserError if the file is missing."""
    files.require(path, "ingest" if path == files.MANIFEST else "validate")
    return pq.read_table(path)


def write(table: pa.Table, path: Path = files.MANIFEST) -> None:
    """Write a manifest sorted by path, so the same rows in any order give the same bytes."""
    table = table.select(SCHEMA.names).sort_by("path").combine_chunks().cast(SCHEMA)
    with files.replacing(path) as temporary:
        pq.write_table(table, temporary)


def root(p: params.Ingest) -> Path:
    """Return the folder that the manifest's paths are relative to."""
    if is_made(p.source):
        return files.RAW
    source = Path(p.source).expanduser()
    return source.parent if is_table(source) else source


def is_made(source: str) -> bool:
    """Tell whether ingest makes or downloads the images."""
    return source == "synthetic" or source.startswith("torchvision:")


def is_table(source: Path) -> bool:
    """Tell whether the source is a list of images in a .csv or .parquet file."""
    return source.suffix.lower() in (".csv", ".parquet") and not source.is_dir()


def hash_split(sha256: Iterable[str], val_fraction: float, test_fraction: float) -> np.ndarray[Any, np.dtype[np.str_]]:
    """Return `test`, `val` or `train` for each hex SHA-256 of an image, (n,).

    The first 32 bits of the hash, as a fraction, decide the split. So new images do not move earlier ones, and all
    copies of an image are in one split.
    """
    u = np.frombuffer(bytes.fromhex("".join(digest[:8] for digest in sha256)), ">u4") / 2**32
    return np.select([u < test_fraction, u < test_fraction + val_fraction], ["test", "val"], "train")
