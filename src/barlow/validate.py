"""`barlow validate`: check the manifest with Great Expectations, and quarantine the images that fail.

Reads `validate` of params.yaml and data/manifest.parquet. Every row goes either into data/accepted.parquet or, with its
reason, into data/quarantine.csv. Also writes data/quarantine/ (thumbnails of the first quarantined files),
reports/validate.json and reports/data_docs/.
If the data set as a whole is not good enough, the command exits with 3 and writes no data/accepted.parquet.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from barlow.core import files, images
from barlow.core.errors import DataError, UserError
from barlow.data import expectations, manifest, validation
from barlow.data.expectations import Outcome
from barlow.data.validation import Check, Counts, Validation
from barlow.settings.params import Params

# No output in dvc.yaml, or DVC would remove it before the stage runs. It holds the last two manifests: validating one
# of them again then compares it with the same one as before.
LAST = Path("data/.last_accepted.json")
SHOWN = 10  # paths in a message
PICTURES = 24  # quarantined files that get a thumbnail


def run(params: Params) -> None:
    """Run the stage.

    Raises:
        DataError: a critical check failed; the message has a table of those that did.
        UserError: fewer than two images are left to train on.
    """
    table = manifest.read()
    for output in (files.ACCEPTED, files.QUARANTINE, files.VALIDATION):
        output.unlink(missing_ok=True)
    suites = expectations.suites(params.validate)
    context = expectations.new_context(files.DATA_DOCS)

    def check(name: str, frame: pd.DataFrame) -> list[Outcome]:
        return expectations.check(context, name, frame, suites[name]) if len(frame) else []

    outcomes = check("schema", _schema(table.schema))
    if not outcomes[0].success:
        validation.write(Validation(table.num_rows, Counts(0, {}), Counts(0, {}), _checks(outcomes)))
        expectations.write_docs(context, files.DATA_DOCS, outcomes)
        raise DataError(_message(outcomes, pd.DataFrame()))

    rows = table.to_pandas()
    outcomes += check("files", rows[["path", "error"]])
    images = rows[rows["error"].isna()].astype({"width": int, "height": int})
    outcomes += check("images", images)
    quarantine = _quarantine({outcome.name: outcome for outcome in outcomes}, images)
    accepted = rows[~rows["path"].isin(quarantine["path"])]
    assert len(accepted) + len(quarantine) == len(rows)
    outcomes += check("dataset", pd.DataFrame({"name": ["all"], "accepted_fraction": [len(accepted) / len(rows)]}))
    outcomes += check("classes", _classes(images, accepted))
    last, drift = _drift(accepted, params.ingest.source)
    outcomes += check("drift", drift)

    with files.replacing(files.QUARANTINE) as temporary:
        quarantine[["path", "reason"]].to_csv(temporary, index=False, lineterminator="\n")
    picture(manifest.root(params.ingest), quarantine["path"].head(PICTURES), params.validate.max_bytes)
    splits = {split: int((accepted["split"] == split).sum()) for split in manifest.SPLITS}
    kinds = {kind: int(n) for kind, n in quarantine["kind"].value_counts().sort_index().items()}
    counts = Counts(len(accepted), splits), Counts(len(quarantine), kinds)
    validation.write(Validation(len(rows), *counts, _checks(outcomes)))
    expectations.write_docs(context, files.DATA_DOCS, outcomes)
    for outcome in outcomes:
        if not outcome.success and outcome.severity == "warning":
            print(f"warning: {outcome.name}: {_figures(outcome)}")
    critical = [outcome for outcome in outcomes if not outcome.success and outcome.severity == "critical"]
    if critical:
        raise DataError(_message(critical, quarantine))
    trainable = int(accepted["split"].isin(["pretrain", "train"]).sum())
    if trainable < 2:
        raise UserError(f"ingest.source={params.ingest.source} has {trainable} accepted images to train on; add images")
    manifest.write(table.filter(pa.array(rows.index.isin(accepted.index))), files.ACCEPTED)
    files.write_json(LAST, last)
    by_kind = "".join(f", {kind} {n}" for kind, n in kinds.items())
    print(f"{len(rows)} images: {len(accepted)} accepted, {len(quarantine)} in quarantine{by_kind}")


def picture(root: Path, paths: Iterable[str], max_bytes: int) -> None:
    """Fill data/quarantine/ with thumbnails: NNN.jpg for file number NNN, if anything of it can be seen."""
    folder = files.QUARANTINED.with_name(f".{files.QUARANTINED.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, path in enumerate(paths):
        try:
            if (root / path).is_file() and (root / path).stat().st_size <= max_bytes:
                (folder / f"{i:03d}.jpg").write_bytes(images.jpeg(images.salvage((root / path).read_bytes())))
        except (OSError, ValueError):  # gone, or not an image at all
            continue
    shutil.rmtree(files.QUARANTINED, ignore_errors=True)
    folder.rename(files.QUARANTINED)


def _schema(schema: pa.Schema) -> pd.DataFrame:
    """Return each column of the manifest with its type and the expected one; "" for a column that is not there."""
    actual, expected = ({field.name: str(field.type) for field in s} for s in (schema, manifest.SCHEMA))
    names = list(expected | actual)
    return pd.DataFrame(
        {"column": names, "found": [actual.get(n, "") for n in names], "expected": [expected.get(n, "") for n in names]}
    )


def _quarantine(outcomes: dict[str, Outcome], images: pd.DataFrame) -> pd.DataFrame:
    """Return path, reason and kind (the first reason's check) of every file to quarantine, sorted by path.

    One copy of each image stays: in test before val, train and pretrain, then the first path. So no test image was ever
    trained on.
    """
    reasons: dict[str, dict[str, list[str]]] = {}  # path -> rule -> the facts that break it
    kinds: dict[str, str] = {}
    for name in ("decodable", "format", "mode", "width", "height", "bytes"):
        if name not in outcomes:
            continue
        for path, value in outcomes[name].rows.items():
            fact, rule = (value, "") if name == "decodable" else (f"{name} {value}", f": {outcomes[name].rule}")
            if name == "mode" and value in ("I", "F"):
                rule += "; save the image with 8 or 16 bits, or add the mode"
            reasons.setdefault(path, {}).setdefault(rule, []).append(fact)
            kinds.setdefault(path, name)
    if "unique" in outcomes:
        copies = images[images["path"].isin(outcomes["unique"].rows) & ~images["path"].isin(reasons)]
        copies = copies.assign(rank=copies["split"].map(manifest.SPLITS.index)).sort_values(
            ["rank", "path"], ascending=[False, True]
        )
        kept = copies.groupby("sha256")["path"].transform("first")
        for path, first in zip(copies["path"], kept, strict=True):
            if path != first:
                reasons[path], kinds[path] = {"": [f"duplicate of {first}"]}, "duplicate"
    rows = [
        (path, "; ".join(", ".join(facts) + rule for rule, facts in reasons[path].items()), kinds[path])
        for path in sorted(reasons)
    ]
    return pd.DataFrame(rows, columns=["path", "reason", "kind"], dtype=object)


def _classes(images: pd.DataFrame, accepted: pd.DataFrame) -> pd.DataFrame:
    """Count the accepted images of every class in each labelled split; 0 where a class is missing from one."""
    labelled = accepted[accepted["label"].notna() & (accepted["split"] != "pretrain")]
    pairs = pd.MultiIndex.from_product([sorted(labelled["split"].unique()), sorted(images["label"].dropna().unique())])
    counts = labelled.groupby(["split", "label"]).size().reindex(pairs, fill_value=0)
    return pd.DataFrame({"class": [f"{split}/{label}" for split, label in pairs], "images": counts.to_numpy(int)})


def _drift(accepted: pd.DataFrame, source: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """Compare brightness and contrast with the last accepted manifest of the same source.

    Returns the new content of LAST, and the Kolmogorov-Smirnov distances of the histograms in whole grey levels: one
    row, or none if there is nothing to compare with.
    """
    now = {c: np.bincount(accepted[c].round().astype(int), minlength=256).tolist() for c in ("brightness", "contrast")}
    digest = files.sha256(files.MANIFEST)
    try:
        last = files.read_json(LAST)
    except (FileNotFoundError, ValueError):
        last = {}
    before = (
        last.get("before" if last.get("manifest") == digest else "histograms") if last.get("source") == source else None
    )
    distances = pd.DataFrame({"name": ["all"]} | {c: [_ks(now[c], before[c])] for c in now} if before else {})
    return {"source": source, "manifest": digest, "histograms": now, "before": before}, distances


def _ks(a: list[int], b: list[int]) -> float:
    """Return the Kolmogorov-Smirnov distance of two histograms: the largest gap between their cumulative shares."""
    shares = [np.cumsum(histogram) / max(sum(histogram), 1) for histogram in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())


def _checks(outcomes: list[Outcome]) -> dict[str, Check]:
    return {o.name: Check(o.success, o.severity, o.observed, o.bound, o.unexpected) for o in outcomes}


def _figures(outcome: Outcome) -> str:
    rows = f", {outcome.unexpected} outside" if outcome.unexpected else ""
    return f"{outcome.observed:g} against {outcome.bound:g}{rows}; {outcome.rule}"


def _message(failed: list[Outcome], quarantine: pd.DataFrame) -> str:
    """Return a table of the failed checks, with the first names of each."""
    lines = [f"the data failed validation; see {files.DATA_DOCS}/index.html"]
    lines.append(f"  {'check':18}{'found':>10}{'bound':>10}  setting")
    for outcome in failed:
        lines.append(f"  {outcome.name:18}{outcome.observed:10g}{outcome.bound:10g}  {outcome.rule}")
        if outcome.name in ("schema", "images_per_class"):
            lines += [f"    {name}: {value}" for name, value in islice(outcome.rows.items(), SHOWN)]
    if len(quarantine):
        lines.append(f"in quarantine, {min(SHOWN, len(quarantine))} of {len(quarantine)} (all in {files.QUARANTINE}):")
        lines += [f"  {row.path}: {row.reason}" for row in quarantine.head(SHOWN).itertuples()]
    if any(outcome.name == "images_per_class" for outcome in failed):
        lines.append(
            "if the splits were drawn, add images or raise ingest.val_fraction and ingest.test_fraction; if the "
            "labels are no classes, such as dates, set ingest.labels: none"
        )
    return "\n".join(lines)
