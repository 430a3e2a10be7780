"""Files that are whole or absent, and the names of those that stages hand to each other."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from barlow.core.errors import UserError

RAW = Path("data/raw")  # images that ingest made or downloaded; a user's own folder is read where it lies
MANIFEST = Path("data/manifest.parquet")
ACCEPTED = Path("data/accepted.parquet")
QUARANTINE = Path("data/quarantine.csv")
QUARANTINED = Path("data/quarantine")  # thumbnails of its first rows: 000.jpg and so on
SHARDS = Path("data/shards")
FEATURES = Path("data/features")  # of `barlow extract`: a file an encoder
ENCODER = Path("models/encoder.safetensors")
HEAD = Path("models/head.safetensors")
CORRELATION = Path("models/correlation.safetensors")
ONNX = Path("models/encoder.onnx")
REDUCED = Path("models/reduced")  # int8.onnx and fp16.onnx
TRITON = Path("models/triton")
INDEX = Path("models/index")  # of `barlow index`: a file an embedding space
DECISION = Path("models/decision.json")  # the last of `barlow promote`
DRIFT = Path("models/drift.json")
REPORTS = Path("reports")
REPORT = REPORTS / "index.html"
VALIDATION = REPORTS / "validate.json"
PRETRAINING = REPORTS / "pretrain.json"
EVALUATION = REPORTS / "evaluate.json"
FINETUNING = REPORTS / "finetune.json"
EXPORTING = REPORTS / "export.json"
CLAIMS = REPORTS / "claims.json"
DATA_DOCS = REPORTS / "data_docs"
CONFUSION = REPORTS / "confusion.csv"
FEW_LABELS = REPORTS / "few_labels.csv"


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit fsync it and rename it over `path`, else remove it.

    A reader, or a crash at any moment, sees the old file or the new one and never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as sorted, indented JSON, whole or not at all; NaN and infinity are refused (ValueError)."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Return what `write_json` wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def require(path: Path | str, command: str) -> None:
    """Check that a file, or a folder, of a command is there.

    Raises:
        UserError: it is not; names the command that writes it.
    """
    if not Path(path).exists():
        raise UserError(f"{path} is missing; run `barlow {command}`, or `dvc repro` for all that is needed")


def sha256(path: Path | str) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cpus() -> int:
    """Return the number of processors this process may use (its affinity mask, not the machine's count)."""
    return len(os.sched_getaffinity(0))
