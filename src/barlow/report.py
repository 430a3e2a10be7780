"""`barlow report`: one self-contained page that shows a run, good or bad, to someone who was not there.

Reads what every other stage wrote: reports/{validation,pretrain,evaluate,export}.json, reports/confusion.csv, the
curves in reports/pretrain/, data/quarantine.csv, data/shards, data/features.safetensors and, of models/,
encoder.safetensors, correlation.safetensors and encoder.onnx. Writes reports/index.html, from report.html.j2 beside
this module.
"""

from __future__ import annotations

import csv
import json
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from torch import Tensor
from torch.nn import functional

from barlow import charts, files, images, model, shards, summary, views
from barlow.errors import UserError
from barlow.params import Params

CURVES = files.REPORTS / "pretrain/plots/metrics"
STAGES = ("validation", "pretrain", "evaluate", "export")  # whose reports/NAME.json are read
CHARTED = ("loss", "on_diagonal", "off_diagonal", "lr")
INPUTS = {
    files.REPORTS / "validation.json": "validate",
    files.QUARANTINE: "validate",
    files.SHARDS / shards.CLASSES: "shard",
    files.REPORTS / "pretrain.json": "pretrain",
    **{CURVES / f"{name}.tsv": "pretrain" for name in CHARTED},
    files.CORRELATION: "pretrain",
    files.ENCODER: "pretrain",
    files.REPORTS / "evaluate.json": "evaluate",
    files.CONFUSION: "evaluate",
    files.FEATURES: "evaluate",
    files.REPORTS / "export.json": "export",
    files.ONNX: "export",
}
NEIGHBOURS = 6  # of each test image that is shown
MISTAKES = 8  # kinds of mistake that are listed


def run(params: Params) -> None:
    """Write the page.

    Raises:
        UserError: a file is missing, or files of different runs lie side by side.
    """
    for path, stage in INPUTS.items():
        if not path.exists():
            raise UserError(f"{path} is missing; run `barlow {stage}`, or `dvc repro` for all that is needed")
    features, names = model.load_weights(files.FEATURES)
    correlation = model.load_weights(files.CORRELATION)[0]
    stages = {name: files.read_json(files.REPORTS / f"{name}.json") for name in STAGES}
    page = {
        **stages,
        "params": params,
        "params_yaml": yaml.safe_dump(json.loads(json.dumps(settings(params))), sort_keys=False, allow_unicode=True),
        "triples": list(triples(params)),
        "curves": {name: charts.chart(curve(name), log=name != "lr") for name in CHARTED},
        "plot": charts.PLOT,
        "correlation": {
            when: charts.matrix_picture(corner.numpy(), -1, 1, charts.DIVERGING) for when, corner in correlation.items()
        },
        "corner": len(correlation["before"]),
        "diverging": charts.DIVERGING,
        "confusion": confusion(names["classes"]),
        "neighbours": neighbours(features, names, params.report.images),
        "splits": {name: shards.count(shards.tars(name)) for name in ("pretrain", "train", "val", "test")},
        "checks": checks(stages["validation"]),
        "quarantine": read_table(files.QUARANTINE, ","),
        "provenance": provenance(),
        "packages": packages(),
    }
    with files.replacing(summary.REPORT) as temporary:
        temporary.write_text(template().render(page), encoding="utf-8")
    print(f"{summary.REPORT}: {summary.REPORT.stat().st_size / 1024:.0f} KiB")


def settings(params: Params) -> dict[str, Any]:
    """Return the sections that the stages depend on; what is done with their encoder later changes no page."""
    return {name: section for name, section in asdict(params).items() if name not in ("promote", "drift")}


def template() -> Template:
    """Return the page's template; it escapes whatever is put into it."""
    environment = Environment(
        loader=PackageLoader("barlow", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    return environment.get_template("report.html.j2")


def printable(text: str) -> str:
    """Spell out line ends, marks that turn the reading direction and the like, which a file's name may hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_table(path: Path, delimiter: str) -> list[list[str]]:
    """Read the rows of a CSV or TSV file below its header."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file, delimiter=delimiter))[1:]


def curve(name: str) -> list[float]:
    """Read a metric that pretrain logged, a value an epoch."""
    return [float(value) for _, value in read_table(CURVES / f"{name}.tsv", "\t")]


def triples(params: Params) -> Iterator[dict[str, str]]:
    """Yield the first images to pretrain on, each with both views."""
    tars = shards.tars("pretrain")
    pairs = views.pairs(tars, params.views, params.report.images, params.pretrain.seed)
    for sample, view_a, view_b in zip(shards.read(tars), *pairs, strict=False):
        yield {
            "image": charts.thumbnail(images.decode(sample.data)),
            "view A": charts.thumbnail(view_a),
            "view B": charts.thumbnail(view_b),
        }


def confusion(classes: list[str]) -> dict[str, Any] | None:
    """Return counts and shares of the actual class, both (actual, predicted); None where nothing was predicted."""
    pairs = [tuple(row) for row in read_table(files.CONFUSION, ",")]
    if not pairs:
        return None
    number = {name: i for i, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, tuple(np.array([[number[name] for name in pair] for pair in pairs]).T), 1)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    mistakes = Counter(pair for pair in pairs if pair[0] != pair[1])
    return {
        "classes": classes,
        "counts": counts.tolist(),
        "shares": shares.tolist(),
        "picture": charts.matrix_picture(shares, 0, 1, charts.SHADES),
        "mistakes": mistakes.most_common(MISTAKES),
    }


def neighbours(features: dict[str, Tensor], names: dict[str, Any], n: int) -> list[list[dict[str, Any]]]:
    """Return rows of a test image and those nearest to it by cosine similarity; no rows where there are none."""
    labels = features["labels"].tolist()
    if not labels:
        return []
    chosen = spread(labels, n)
    unit = functional.normalize(features["features"])
    similarity = unit[chosen] @ unit.T
    similarity[range(len(chosen)), chosen] = -torch.inf  # not itself
    nearest = similarity.argsort(dim=1, descending=True, stable=True)[:, : min(NEIGHBOURS, len(labels) - 1)].tolist()
    pictures = thumbnails({names["keys"][i] for row in [chosen, *nearest] for i in row})

    def shown(i: int) -> dict[str, Any]:
        return {"picture": pictures[names["keys"][i]], "class": names["classes"][labels[i]] if labels[i] >= 0 else None}

    return [[shown(i) for i in (query, *row)] for query, row in zip(chosen, nearest, strict=True)]


def spread(labels: list[int], n: int) -> list[int]:
    """Return the indices of `n` images, or of all there are, whose classes are as different as can be."""
    by_class: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for i, label in enumerate(labels):
        by_class[label].append(i)
    in_turn = [i for turn in zip_longest(*by_class.values()) for i in turn if i is not None]
    pool = in_turn[: max(n, len(by_class))]
    return [pool[i] for i in np.linspace(0, len(pool) - 1, min(n, len(pool))).astype(int)]


def thumbnails(keys: set[str]) -> dict[str, str]:
    """Find test images by key."""
    samples = (sample for sample in shards.read(shards.tars("test")) if sample.key in keys)
    found = {sample.key: charts.thumbnail(images.decode(sample.data)) for sample in samples}
    if missing := keys - found.keys():
        raise UserError(
            f"{files.SHARDS} lacks {min(missing)}, which {files.FEATURES} names; run `barlow evaluate` again"
        )
    return found


def checks(validation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what each expectation found, by its name."""
    names = [key.removesuffix("_success") for key in validation if key.endswith("_success")]
    fields = ("success", "severity", "observed", "bound", "unexpected")
    return {name: {field: validation[f"{name}_{field}"] for field in fields} for name in names}


def provenance() -> dict[str, str]:
    """Return where the encoder and this page come from."""
    exported = onnx.load(str(files.ONNX), load_external_data=False).metadata_props
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "code, git revision": revision(),
        "data, SHA-256": str(model.load_weights(files.ENCODER)[1].get("data", "unknown")),
        f"{files.ENCODER}, SHA-256": files.sha256(files.ENCODER),
        f"{files.ONNX}, SHA-256": files.sha256(files.ONNX),
        **{f"{files.ONNX.name}, {p.key}": p.value for p in exported if p.key != "classes"},
        "this page: processors": f"{files.cpus()} of {processor[1] if processor else platform.machine()}",
        "this page: GPUs": ", ".join(gpus) or "none",
        "this page: system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def revision() -> str:
    """Return the project's git revision, and whether the code or the settings differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", "src", "params.yaml")
        return f"{commit}, with uncommitted changes in src or params.yaml" if changed else commit
    except (OSError, subprocess.CalledProcessError):
        return "not in a git repository"


def packages() -> dict[str, str]:
    """Return the versions of what the pipeline runs on, as far as it is installed."""
    required = [r for r in metadata.requires("barlow") or [] if "extra ==" not in r or 'extra == "train"' in r]
    found = {}
    for name in ["barlow", *sorted({re.split(r"[^\w.-]", requirement)[0] for requirement in required})]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
