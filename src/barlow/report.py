"""`barlow report`: one self-contained page that shows a run, good or bad, to someone who was not there.

Reads what every other stage wrote, INPUTS, and reports/claims.json, which `barlow claims` writes. Writes
reports/index.html, from report.html.j2 beside this module.
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

from barlow.core import files, images, provenance, webdataset
from barlow.core.errors import UserError
from barlow.core.weights import load_metadata, load_weights
from barlow.data import manifest
from barlow.evaluation import features
from barlow.reporting import charts, gallery, pages, pictures, results
from barlow.settings.params import Params
from barlow.training import views

STAGES = ("validate", "pretrain", "evaluate", "finetune", "export")  # whose reports/NAME.json are read
LINEAR = ("std", "lr", "samples_per_second", "data_wait", "gradient_norm", "weight_norm")
CURVES = {name: pages.CURVES / f"{name}.tsv" for name in pages.LOGARITHMIC + LINEAR}
CLAIMS = files.REPORTS / "claims.json"
INPUTS = {
    files.REPORTS / "validate.json": "validate",
    files.QUARANTINE: "validate",
    files.ACCEPTED: "validate",
    files.SHARDS / webdataset.CLASSES_FILE: "shard",
    files.REPORTS / "pretrain.json": "pretrain",
    **dict.fromkeys(CURVES.values(), "pretrain"),
    files.CORRELATION: "pretrain",
    files.ENCODER: "pretrain",
    files.FEATURES: "extract",
    files.REPORTS / "evaluate.json": "evaluate",
    files.CONFUSION: "evaluate",
    files.FEW_LABELS: "evaluate",
    files.REPORTS / "finetune.json": "finetune",
    files.REPORTS / "export.json": "export",
    files.ONNX: "export",
    CLAIMS: "claims",
}
ASIDE = 24  # files that were put aside, at most
COUNTED = 20  # classes, at most


def run(params: Params) -> None:
    """Write the page.

    Raises:
        UserError: a file is missing, or files of different runs lie side by side.
    """
    for path, stage in INPUTS.items():
        files.require(path, stage)
    stages = {name: files.read_json(files.REPORTS / f"{name}.json") for name in STAGES}
    classes = webdataset.classes()
    test = features.load("pretrained", "test")
    metrics = stages["evaluate"] | stages["finetune"]
    correlation = load_weights(files.CORRELATION)[0]
    confusion = results.confusion(pages.read_table(files.CONFUSION), classes)
    quarantine = pages.read_table(files.QUARANTINE)
    page = {
        **stages,
        "params": params,
        "params_yaml": yaml.safe_dump(json.loads(json.dumps(settings(params))), sort_keys=False, allow_unicode=True),
        "classes": classes,
        "test_images": len(test.keys),
        "metrics": metrics,
        "methods": results.methods(metrics),
        "few": results.few_labels(metrics, pages.read_table(files.FEW_LABELS)),
        "examples": examples(classes),
        "splits": {name: webdataset.count(webdataset.tars(name)) for name in manifest.SPLITS},
        "class_counts": class_counts(classes),
        "quarantine": quarantine,
        "aside": list(aside(quarantine)),
        "checks": checks(stages["validate"]),
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
        "claims": claims(),
        "provenance": facts(),
        "packages": provenance.packages(),
    }
    pages.write(files.REPORT, "report.html.j2", page)


def settings(params: Params) -> dict[str, Any]:
    """Return the sections that the stages depend on; what is done with their encoder later changes no page."""
    return {name: section for name, section in asdict(params).items() if name not in ("promote", "drift")}


def triples(params: Params) -> Iterator[dict[str, str]]:
    """Yield the first images to pretrain on, each with both views."""
    tars = webdataset.tars("pretrain")
    pairs = views.pairs(tars, params.views, params.report.images, params.pretrain.seed)
    for sample, view_a, view_b in zip(webdataset.read(tars), *pairs, strict=False):
        shown = {"image": images.decode(sample.data), "view A": view_a, "view B": view_b}
        yield {name: pictures.thumbnail(pixels) for name, pixels in shown.items()}


def examples(classes: list[str]) -> list[dict[str, Any]]:
    """Return thumbnails of some images of some classes."""
    return [
        {"name": kind["name"], "pictures": [pictures.thumbnail(kind["pixels"][key]) for key in kind["keys"]]}
        for kind in gallery.examples(features.load("pretrained", "train"), classes)
    ]


def class_counts(classes: list[str]) -> list[tuple[str, list[int]]]:
    """Return how many accepted images of each class are in train, val and test; of many, the smallest classes."""
    table = manifest.read(files.ACCEPTED).group_by(["split", "label"]).aggregate([([], "count_all")]).to_pylist()
    counts = {(row["split"], row["label"]): row["count_all"] for row in table}
    rows = [(name, [counts.get((split, name), 0) for split in ("train", "val", "test")]) for name in classes]
    return rows if len(rows) <= COUNTED else sorted(rows, key=lambda row: row[1])[:COUNTED]


def aside(quarantine: list[list[str]]) -> Iterator[tuple[str, str, str | None]]:
    """Yield path, reason and, where there is something to see, picture of the first files that were put aside."""
    for i, (path, reason) in enumerate(quarantine[:ASIDE]):
        picture = files.QUARANTINED / f"{i:03d}.jpg"
        yield path, reason, pictures.address(picture.read_bytes()) if picture.exists() else None


def shown(test: features.Split, classes: list[str], confusion: dict[str, Any] | None, n: int) -> dict[str, Any]:
    """Return `neighbours` and `confusion`, with pictures of the test images that they name by number."""
    found = gallery.neighbours(test, n)
    rows = [row for kind in found.values() for row in kind]
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
    return {"neighbours": found, "confusion": confusion}


def checks(validation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what each expectation found, by its name."""
    names = [key.removesuffix("_success") for key in validation if key.endswith("_success")]
    fields = ("success", "severity", "observed", "bound", "unexpected")
    return {name: {field: validation[f"{name}_{field}"] for field in fields} for name in names}


def claims() -> dict[str, Any]:
    """Return reports/claims.json with each claim laid out."""
    document: dict[str, Any] = files.read_json(CLAIMS)
    return document | {
        "claims": [results.claim(entry | {"metric": document["metric"]}) for entry in document["claims"]]
    }


def facts() -> dict[str, dict[str, str]]:
    """Return what is known of the encoder, of its ONNX file and of the page that is being written."""
    exported = onnx.load(str(files.ONNX), load_external_data=False).metadata_props
    trained, pretrained = load_metadata(files.ENCODER), files.read_json(files.REPORTS / "pretrain.json")
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
