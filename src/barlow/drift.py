"""`barlow drift [RECENT]`: are recent images still like those that the encoder in production was trained on?

Reads a folder of images or a Parquet file of `barlow embed`. Reads encoder.onnx and reference.npy (embeddings of a
sample of the training images) of the version in production. Writes models/drift.json, which also holds the number of
breaches in a row.

A breach needs two tests on unit embeddings to agree. The first is on the size of the difference: the whole interval of
a classifier's AUC must be above drift.max_auc, since with many images even a harmless difference is significant. The
second is the permutation test of MMD, which is exact for any number of images; the interval is not. Both tests assume
independent images. Frames of one minute are not independent, so only `drift.breaches` breaches in a row are drift.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from barlow.core import files
from barlow.core.bands import PixelFormat, Pixels
from barlow.core.errors import UserError
from barlow.encoder.encoder import Encoder, Vectors, unit
from barlow.encoder.reading import find, read_ahead
from barlow.encoder.registry import Registry, Version
from barlow.production.two_sample import FOLDS, auc, auc_interval, cross_fitted_scores, mmd_test, whitened
from barlow.settings.params import Drift, Params

PERMUTATIONS = 500
NAMED = 5  # skipped files that are listed by name


def run(params: Params, recent: str | None = None) -> None:
    """Compare recent images with the reference, write models/drift.json and print the verdict.

    Raises:
        UserError: no recent images are named, nothing is in production, or either cannot be used.
    """
    p, recent = params.drift, recent or params.drift.recent
    if recent is None:
        raise UserError(
            "no recent images are named; write `barlow drift FOLDER|PARQUET`, or set drift.recent in params.yaml"
        )
    if p.max_images < p.min_images:
        raise UserError(f"drift.max_images={p.max_images} is below drift.min_images={p.min_images}; raise it")
    version = Registry(params.promote.registry).production()
    if version is None:
        raise UserError(f"promote.registry={params.promote.registry} has nothing in production; run `barlow promote`")
    encoder, rng = Encoder(version.onnx), np.random.default_rng(p.seed)
    reference = _sample(_read_reference(version, encoder.dim), p.max_images, rng)
    path, skipped = Path(recent).expanduser(), list[str]()
    if path.is_dir():
        embeddings = encoder.embed(_decoded(newest(path, p.max_images), skipped, encoder.form))
    else:
        embeddings = _sample(_read_parquet(path, encoder, version), p.max_images, rng)

    result: dict[str, Any] = dict.fromkeys(("auc", "auc_low", "auc_high", "mmd2", "mmd_p"))
    result |= {"version": version.name, "space": encoder.metadata["space"], "max_auc": p.max_auc}
    result |= {"recent": _text(recent), "images": len(embeddings)}
    result |= {"skipped": len(skipped), "skipped_first": skipped[:NAMED]}
    last = _last(result)
    result |= {"breach": False, "verdict": "too few images"}
    result |= {"breaches": last.get("breaches", 0), "evidence": last.get("evidence")}
    if len(embeddings) >= p.min_images:
        result["evidence"] = hashlib.sha256(embeddings.tobytes()).hexdigest()[:16]
        x, y = (unit(rows.astype(np.float64)) for rows in (reference, embeddings))
        scores = cross_fitted_scores(x, y, rng)
        result["auc"] = auc(*scores)
        result["auc_low"], result["auc_high"] = auc_interval(*scores, rng)
        result["mmd2"], result["mmd_p"] = mmd_test(*whitened(x, y), PERMUTATIONS, rng)
        result["breach"] = result["auc_low"] > p.max_auc and result["mmd_p"] <= p.max_p
        new = result["evidence"] != last.get("evidence")  # the same images again do not count twice
        result["breaches"] = result["breaches"] + new if result["breach"] else 0
        result["verdict"] = _verdict(result, p)
    result["drifted"] = result["breach"] and result["breaches"] >= p.breaches
    files.write_json(files.DRIFT, result)
    print(f"{result['verdict']} ({result['recent']}: {len(embeddings)} images, {len(skipped)} files skipped)")


def newest(folder: Path, most: int) -> list[str]:
    """Return the `most` image files below a folder that changed last, newest first; ties by name, from z to a."""
    changed = []
    for path in find([folder]):
        with suppress(OSError):  # deleted meanwhile, or a broken link
            status = Path(path).stat()
            if stat.S_ISREG(status.st_mode):  # reading a pipe would block
                changed.append((status.st_mtime_ns, path))
    return [path for _, path in sorted(changed, reverse=True)[:most]]


def _decoded(paths: list[str], skipped: list[str], form: PixelFormat) -> Iterator[Pixels]:
    """Yield the images that can be decoded; add the other paths, with the reason, to `skipped`."""
    for path, image in read_ahead(paths, files.cpus(), form):
        if isinstance(image, str):
            skipped.append(_text(f"{path}: {image}"))
        else:
            yield image


def _read_parquet(path: Path, encoder: Encoder, version: Version) -> Vectors:
    """Return the embeddings (n, dim) in a file of `barlow embed`; raises UserError if another encoder made them."""
    remedy = f"run `barlow embed FOLDER --model {version.onnx} --out {path}`"
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise UserError(f"drift.recent={path} is not a regular file; {remedy}")
    try:
        with parquet.ParquetFile(path) as file:
            schema, table = file.schema_arrow, file.read(["embedding"])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a folder of images or a Parquet file") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no folder and no whole Parquet file ({reason}); {remedy}") from None
    space, wanted = (schema.metadata or {}).get(b"space", b"unknown").decode(), encoder.metadata["space"]
    if space != wanted:
        raise UserError(f"{path}: embedding space {space}, but {version.name} has {wanted}; {remedy}")
    if [field.type for field in schema if field.name == "embedding"] != [pa.list_(pa.float32(), encoder.dim)]:
        raise UserError(f"{path}: no column embedding with {encoder.dim} float32 per row; {remedy}")
    values = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if not np.isfinite(values).all():
        raise UserError(f"{path}: an embedding holds NaN or infinity; {remedy}")
    return values.reshape(-1, encoder.dim)  # type: ignore[no-any-return]


def _read_reference(version: Version, dim: int) -> Vectors:
    path, remedy = version.reference, "restore it, or promote another encoder"
    try:
        with path.open("rb") as file:
            rows: Vectors = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    if rows.dtype != np.float32 or rows.shape[1:] != (dim,) or len(rows) < 2 * FOLDS or not np.isfinite(rows).all():
        wanted = f"at least {2 * FOLDS} rows of {dim} finite float32"
        raise UserError(f"{path} holds {rows.dtype} of shape {rows.shape}, not {wanted}; {remedy}")
    return rows


def _sample(rows: Vectors, most: int, rng: np.random.Generator) -> Vectors:
    return rows[rng.permutation(len(rows))[:most]]


def _last(now: dict[str, Any]) -> dict[str, Any]:
    """Return the result of the last check; empty if it was of another encoder or cannot be read."""
    if not files.DRIFT.exists():
        return {}
    try:
        last: dict[str, Any] = files.read_json(files.DRIFT)
        if type(last["breaches"]) is not int or last["breaches"] < 0:
            raise ValueError(f"breaches={last['breaches']!r}")
        return last if all(last[key] == now[key] for key in ("version", "space")) else {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(
            f"warning: {files.DRIFT} is not a result of `barlow drift` ({error!r}); breaches are counted from 0",
            file=sys.stderr,
        )
        return {}


def _verdict(result: dict[str, Any], p: Drift) -> str:
    auc, low, high = (f"{result[key]:.2f}" for key in ("auc", "auc_low", "auc_high"))
    figures = f"AUC {auc}, {low} to {high}, drift.max_auc={p.max_auc}; p {result['mmd_p']:.3f}, drift.max_p={p.max_p}"
    if not result["breach"]:
        return f"like what {result['version']} was trained on: {figures}"
    kind = "drift" if result["breaches"] >= p.breaches else "breach"
    row = f"{result['breaches']} in a row, drift.breaches={p.breaches}"
    return f"{kind}: unlike what {result['version']} was trained on, {row}: {figures}"


def _text(path: str) -> str:
    """Return a path with the bytes that are not UTF-8 spelled out, as `barlow embed` does."""
    return os.fsencode(path).decode(errors="backslashreplace")
