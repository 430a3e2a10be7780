"""`barlow report`: write one self-contained page that shows a run, good or bad, to someone who was not there.

Reads what the other stages wrote (INPUTS), and reports/claims.json of `barlow claims`. Writes reports/index.html from
reporting/templates/report.html.j2.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from typing import Any

import onnx
import yaml

from barlow.core import bands, files, provenance, webdataset
from barlow.core.errors import UserError
from barlow.core.weights import load_metadata, load_weights
from barlow.data import manifest, sources, validation
from barlow.evaluation import features, tables, verdict
from barlow.evaluation.figures import Evaluation, Exporting, FineTuning, leaves, read
from barlow.reporting import charts, gallery, pages, pictures, results
from barlow.settings.params import Ingest, Params
from barlow.training import views

LINEAR = ("std", "lr", "samples_per_second", "data_wait", "gradient_norm", "weight_norm")
CURVES = {name: pages.CURVES / f"{name}.tsv" for name in pages.LOGARITHMIC + LINEAR}
INPUTS = {
    files.VALIDATION: "validate",
    files.QUARANTINE: "validate",
    files.ACCEPTED: "validate",
    files.SHARDS / webdataset.CLASSES_FILE: "shard",
    files.PRETRAINING: "pretrain",
    **dict.fromkeys(CURVES.values(), "pretrain"),
    files.CORRELATION: "pretrain",
    files.ENCODER: "pretrain",
    files.FEATURES: "extract",
    files.EVALUATION: "evaluate",
    files.CONFUSION: "evaluate",
    files.FEW_LABELS: "evaluate",
    files.FINETUNING: "finetune",
    files.EXPORTING: "export",
    files.ONNX: "export",
}
QUARANTINE_SHOWN = 24  # quarantined files, at most
COUNTED = 20  # classes, at most


def run(params: Params) -> None:
    """Write the page.

    Raises:
        UserError: a file is missing, or files of different runs lie side by side.
    """
    for path, stage in INPUTS.items():
        files.require(path, stage)
    evaluation, finetuning = read(Evaluation, files.EVALUATION), read(FineTuning, files.FINETUNING)
    classes, pretraining = webdataset.classes(), files.read_json(files.PRETRAINING)
    test = features.load("pretrained", "test")
    correlation = load_weights(files.CORRELATION)[0]
    confusion = results.confusion(pages.read_table(files.CONFUSION), classes)
    quarantine = pages.read_table(files.QUARANTINE)
    sections = yaml.safe_dump(json.loads(json.dumps(stage_sections(params))), sort_keys=False, allow_unicode=True)
    page = {
        "validation": validation.read(),
        "pretraining": pretraining,
        "evaluation": evaluation,
        "supervised": finetuning.supervised,
        "exporting": read(Exporting, files.EXPORTING),
        "export_rows": leaves(files.read_json(files.EXPORTING)),
        "params": params,
        "params_yaml": sections,
        "classes": classes,
        "test_images": len(test.keys),
        "encoders": tables.titles(evaluation, results.ENCODERS),
        "methods": results.methods(evaluation, finetuning),
        "verdict": verdict.verdict(evaluation),
        "notes": verdict.notes(evaluation, pretraining),
        "label_budgets": results.label_budgets(evaluation),
        "few_labels_chart": results.few_labels(evaluation, finetuning, pages.read_table(files.FEW_LABELS)),
        "examples": examples(classes),
        "splits": {name: webdataset.count(webdataset.tars(name)) for name in manifest.SPLITS},
        "class_counts": class_counts(classes),
        "quarantine": quarantine,
        "quarantine_shown": list(quarantined(quarantine)),
        "triples": list(triples(params)),
        "curves": {
            name: charts.curves([pages.curve(path.read_text())], log=name in pages.LOGARITHMIC)
            for name, path in CURVES.items()
        },
        "correlation": {
            when: pictures.matrix(corner.numpy(), -1, 1, pictures.DIVERGING) for when, corner in correlation.items()
        },
        "corner": len(correlation["before"]),
        "map": gallery.embedding_map(test, classes),
        **shown(test, classes, confusion, params.report.images),
        "class_ends": results.ends(confusion["by_class"]) if confusion else [],
        "claims": claims(params.ingest),
        "provenance": facts(),
        "packages": provenance.packages(),
    }
    pages.write(files.REPORT, "report.html.j2", page)


def stage_sections(params: Params) -> dict[str, Any]:
    """Return the sections of params.yaml that stages read; those of later commands must not change the page."""
    return {name: section for name, section in asdict(params).items() if name not in ("promote", "drift")}


def triples(params: Params) -> Iterator[dict[str, str]]:
    """Yield the first images to pretrain on, each with both views."""
    tars = webdataset.tars("pretrain")
    pairs = views.pairs(tars, params.views, params.report.images, params.pretrain.seed)
    for sample, view_a, view_b in zip(webdataset.read(tars), *pairs, strict=False):
        shown = {"image": bands.preview(bands.unpack(sample.data)), "view A": view_a, "view B": view_b}
        yield {name: pictures.thumbnail(pixels) for name, pixels in shown.items()}


def examples(classes: list[str]) -> list[dict[str, Any]]:
    """Return thumbnails of some images of some classes."""
    return [
        {"name": kind["name"], "pictures": [pictures.thumbnail(kind["pixels"][key]) for key in kind["keys"]]}
        for kind in gallery.examples(features.load("pretrained", "train"), classes)
    ]


def class_counts(classes: list[str]) -> list[tuple[str, list[int]]]:
    """Count the accepted images of each class in train, val and test; of many classes, only the smallest."""
    table = manifest.read(files.ACCEPTED).group_by(["split", "label"]).aggregate([([], "count_all")]).to_pylist()
    counts = {(row["split"], row["label"]): row["count_all"] for row in table}
    rows = [(name, [counts.get((split, name), 0) for split in ("train", "val", "test")]) for name in classes]
    return rows if len(rows) <= COUNTED else sorted(rows, key=lambda row: row[1])[:COUNTED]


def quarantined(quarantine: list[list[str]]) -> Iterator[tuple[str, str, str | None]]:
    """Yield path, reason and thumbnail of the first quarantined files; None if nothing of a file can be seen."""
    for i, (path, reason) in enumerate(quarantine[:QUARANTINE_SHOWN]):
        picture = files.QUARANTINED / f"{i:03d}.jpg"
        yield path, reason, pictures.address(picture.read_bytes()) if picture.exists() else None


def shown(test: features.Split, classes: list[str], confusion: dict[str, Any] | None, n: int) -> dict[str, Any]:
    """Return `neighbours` and `confusion`, and put pictures of the test images beside their numbers."""
    neighbours = gallery.neighbours(test, n)
    rows = [row for kind in neighbours.values() for row in kind]
    mistakes = confusion["mistakes"] if confusion else []
    numbers = {
        *chain.from_iterable(row["images"] for row in rows),
        *chain.from_iterable(m[2][: gallery.EXAMPLES] for m in mistakes),
    }
    if max(numbers, default=-1) >= len(test.keys):
        raise UserError(f"{files.CONFUSION} has more images than {files.FEATURES}; run `barlow evaluate` again")
    pixels = gallery.load("test", [test.keys[i] for i in numbers])
    thumbnails = {i: pictures.thumbnail(pixels[test.keys[i]]) for i in numbers}
    for row in rows:
        labels = [int(test.labels[i]) for i in row["images"]]
        row["shown"] = [
            {"picture": thumbnails[i], "class": classes[label] if label >= 0 else None}
            for i, label in zip(row["images"], labels, strict=True)
        ]
    if confusion:
        confusion["mistakes"] = [(*m, [thumbnails[i] for i in m[2][: gallery.EXAMPLES]]) for m in mistakes]
    return {"neighbours": neighbours, "confusion": confusion}


def claims(ingest: Ingest) -> dict[str, Any]:
    """Return reports/claims.json with each claim laid out; if they were tested on other data, `elsewhere` names it."""
    document: dict[str, Any] = files.read_json(files.CLAIMS) if files.CLAIMS.exists() else {"claims": []}
    try:
        if document["claims"] == []:
            return {"claims": [], "elsewhere": None}
        if document["data"] != sources.identity(ingest):
            return {"claims": [], "elsewhere": document["data"]["source"]}
        return document | {"claims": [results.claim(entry) for entry in document["claims"]]}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{files.CLAIMS} is damaged or of an older version; run `barlow claims` again") from None


def facts() -> dict[str, dict[str, str]]:
    """Return the provenance of the encoder, of its ONNX file and of the page itself."""
    exported = onnx.load(str(files.ONNX), load_external_data=False).metadata_props
    trained, pretrained = load_metadata(files.ENCODER), files.read_json(files.PRETRAINING)
    return {
        "Encoder": {
            "training images, SHA-256": str(trained.get("data", "unknown")),
            **{f"training: {name}": str(trained[name]) for name in ("version", "steps") if name in trained},
            **{f"training: {name}": str(pretrained[name]) for name in ("hardware", "processes") if name in pretrained},
            f"{files.ENCODER}, SHA-256": files.sha256(files.ENCODER),
        },
        str(files.ONNX): {
            "SHA-256": files.sha256(files.ONNX),
            **{p.key.replace("_", " "): p.value for p in exported if p.key != "classes"},
        },
        "This page": {
            "git revision": provenance.revision(),
            "hardware": provenance.hardware(),
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        },
    }
