"""The paths of the files that commands hand to each other, and how to read and write a file, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from barlow.core.errors import UserError

RAW = Path("data/raw")  # images that ingest made or downloaded; a user's own images stay where they are
MANIFEST = Path("data/manifest.parquet")
ACCEPTED = Path("data/accepted.parquet")
QUARANTINE = Path("data/quarantine.csv")
QUARANTINED = Path("data/quarantine")  # thumbnails of its first rows: 000.jpg and so on
SHARDS = Path("data/shards")
FEATURES = Path("data/features")  # from `barlow extract`: one file per encoder
ENCODER = Path("models/encoder.safetensors")
HEAD = Path("models/head.safetensors")
CORRELATION = Path("models/correlation.safetensors")
ONNX = Path("models/encoder.onnx")
CLASSIFIER = Path("models/classifier.onnx")  # from `barlow finetune --all-labels`
KINDS = {"encoder": ONNX, "classifier": CLASSIFIER}  # what `barlow promote` can put into production
REDUCED = Path("models/reduced")  # int8.onnx and fp16.onnx
TRITON = Path("models/triton")
INDEX = Path("models/index")  # from `barlow index`: one file per embedding space
DECISION = Path("models/decision.json")  # the last one of `barlow promote`
DRIFT = Path("models/drift.json")  # the last check of `barlow drift`
REPORTS = Path("reports")
REPORT = REPORTS / "index.html"
VALIDATION = REPORTS / "validate.json"
PRETRAINING = REPORTS / "pretrain.json"
EVALUATION = REPORTS / "evaluate.json"
FINETUNING = REPORTS / "finetune.json"
CLASSIFYING = REPORTS / "classifier.json"
EXPORTING = REPORTS / "export.json"
CLAIMS = REPORTS / "claims.json"
TUNING = REPORTS / "tune.json"
DATA_DOCS = REPORTS / "data_docs"
CONFUSION = REPORTS / "confusion.csv"
FEW_LABELS = REPORTS / "few_labels.csv"


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On a clean exit it is synced and renamed over `path`, else removed.

    So a reader sees the old file or the new one and never a part, even after a crash.
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
    """Wait until the content of a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as sorted, indented JSON, whole or not at all; raises ValueError for NaN and infinity."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Return what `write_json` wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def require(path: Path | str, command: str, hint: str = ", or `dvc repro` for all that is needed") -> None:
    """Check that a file or folder exists. A pipe or a device, which could block a reader, counts as missing.

    Raises:
        UserError: it does not exist. The message names the command that writes it, and ends with `hint`.
    """
    if not (Path(path).is_file() or Path(path).is_dir()):
        raise UserError(f"{path} is missing; run `barlow {command}`{hint}")


def sha256(path: Path | str) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cpus() -> int:
    """Return the number of processors that this process may use: its affinity mask, not all of the machine."""
    return len(os.sched_getaffinity(0))
