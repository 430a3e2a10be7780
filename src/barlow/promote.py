"""`barlow promote`: put models/encoder.onnx into production if it passes the gate.

Reads models/encoder.onnx, data/shards, data/features, reports/{validate,pretrain,evaluate,export}.json
and the registry. With `--kind classifier` it reads models/classifier.onnx and reports/classifier.json, and compares
with the classifier in production; the encoder in production stays. Writes models/decision.json and, in the registry,
a new version, the link to it, and the log.

promoted: every check holds; the first version is not compared with another. unchanged: this very file is in
production. refused (exit code 4): a check fails, a metric is missing or not a finite number, the list of classes
changed, the version in production is damaged, or this file was rolled back before.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from barlow.core import files
from barlow.core.errors import GateError, UserError
from barlow.data.validation import Validation
from barlow.encoder.encoder import Encoder
from barlow.encoder.registry import Registry, Version, now
from barlow.evaluation import figures, tables
from barlow.evaluation.figures import Candidate, Evaluation, Exporting
from barlow.production import tags
from barlow.settings.params import Params

METRICS = {  # a version's card keeps reports/NAME.json of these
    "encoder": ("validate", "pretrain", "evaluate", "export"),
    "classifier": ("validate", "pretrain", "classifier"),
}


def run(params: Params, check: bool = False, kind: str = "encoder") -> None:
    """Decide and, if the gate says so, promote; with `check`, only see whether a promotion could work.

    Raises:
        UserError: there is no file of this kind, code or settings are not committed, or the registry cannot be written.
        GateError: the encoder does not pass the gate.
        Interrupted: another process is promoting.
    """
    registry = Registry(params.promote.registry, kind)
    tags.require_clean()
    if not check:
        found = Encoder(files.KINDS[kind]).kind
        if found != kind:
            raise UserError(f"{files.KINDS[kind]} holds a model of kind {found}; write the {kind} there again")
    with registry.locked():
        champion = registry.production()
        if check:
            print(f"{registry.folder}: {champion.name if champion else 'nothing'} is in production, and it can change")
            return
        decision = decide(params, registry, champion, kind)
        version = champion
        if decision["decision"] == "promoted":
            version = registry.find(decision["sha256"]) or _add(params, registry, decision, kind)
            registry.point(version)
        decision["production"] = version.name if version else None
        if version and decision["decision"] != "refused":
            decision["tags"] = tags.tag(version)
        registry.log(decision["decision"], decision)
    files.write_json(files.DECISION, decision)
    text = f"{decision['decision']}: {decision['reason']}"
    if decision["decision"] == "refused":
        raise GateError(f"{text}; in production is {decision['production'] or 'nothing'}")
    print(f"{text}; in production is {decision['production']}")


def decide(params: Params, registry: Registry, champion: Version | None, kind: str) -> dict[str, Any]:
    """Return the decision with its measurements; change nothing."""
    from barlow.evaluation import classifier  # torch takes seconds, which `check` need not wait for
    from barlow.production import gate

    path, sha256 = files.KINDS[kind], files.sha256(files.KINDS[kind])
    decision: dict[str, Any] = {"time": now(), "kind": kind, "sha256": sha256}
    decision["champion"] = champion.name if champion else None
    challenger = Encoder(path)
    decision |= {"space": challenger.metadata["space"], "gate": asdict(params.promote), "figures": {}, "checks": {}}

    def outcome(name: str, reason: str) -> dict[str, Any]:
        return {**decision, "decision": name, "reason": reason}

    known = registry.find(sha256)
    if known and known.name in registry.withdrawn():
        text = f"this is {known.name}, which was rolled back on {registry.withdrawn()[known.name]}"
        return outcome("refused", f"{text}; `barlow rollback {known.name}{_flag(kind)}` puts it back")
    if champion and (damage := champion.damage()):
        return outcome(
            "refused", f"{champion.name}, in production, is damaged: {damage}; `barlow rollback{_flag(kind)}` first"
        )
    if champion and champion.card["sha256"] == sha256:
        return outcome("unchanged", f"this very {kind} is {champion.name}")
    try:
        _complete(metrics(kind), sha256)
        measured = gate.measure(challenger, params)
        candidate = measured.candidate()
        decision["figures"] = {"challenger": asdict(candidate)}
        checks = [*gate.alone(candidate, path.stat().st_size, params)]
        if kind == "classifier":
            checks.append(gate.recorded(classifier.read().parity, params.export.min_cosine))
        else:
            checks.append(gate.parity(measured.test, params.export.min_cosine))
        incumbent = None
        if champion:
            incumbent = Encoder(champion.onnx)
            checks += gate.same_classes(challenger, incumbent, params.promote.allow_other_classes)
            standing = gate.measure(incumbent, params)
            decision["figures"][champion.name] = asdict(standing.candidate())
            checks += gate.against(measured, standing, params)
        checks += gate.latency(challenger, incumbent, params)
    except (GateError, FileNotFoundError) as error:
        return outcome("refused", str(error))
    decision["checks"] = {c.name: {"passed": c.passed, "text": c.text} for c in checks}
    if failed := [c for c in checks if not c.passed]:
        return outcome("refused", "; ".join(f"{c.name}: {c.text}" for c in failed))
    if champion is None:
        return outcome("promoted", "the first version, and healthy")
    labels = "" if measured.right else " (no labels: accuracy was not compared)"
    return outcome("promoted", f"not worse than {champion.name} in {len(checks)} checks{labels}")


def _flag(kind: str) -> str:
    return "" if kind == "encoder" else f" --kind {kind}"


def metrics(kind: str) -> dict[str, dict[str, Any]]:
    """Return reports/NAME.json by NAME; raises FileNotFoundError, and GateError where one is damaged."""
    try:
        return {name: figures.document(files.REPORTS / f"{name}.json") for name in METRICS[kind]}
    except UserError as error:
        raise GateError(str(error)) from None


def _complete(documents: dict[str, dict[str, Any]], sha256: str) -> None:
    """Check that the metrics are complete, finite and, of a classifier, those of the file; raises GateError."""
    from barlow.evaluation import classifier

    for stage, document in documents.items():
        for key, value in figures.leaves(document).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise GateError(f"{key} in {files.REPORTS / stage}.json is {value}")
    try:
        figures.build(Validation, documents["validate"], str(files.VALIDATION))
        if "classifier" in documents:
            if classifier.read().sha256 != sha256:
                text = f"{files.CLASSIFYING} is of another file than {files.CLASSIFIER}"
                raise GateError(f"{text}; run `barlow finetune --all-labels`")
        else:
            figures.build(Exporting, documents["export"], str(files.EXPORTING))
            evaluation = figures.build(Evaluation, documents["evaluate"], str(files.EVALUATION))
            if "pretrained" not in evaluation.encoders:
                raise GateError(f"{files.EVALUATION} has no encoders.pretrained; run `dvc repro`")
    except UserError as error:
        raise GateError(str(error)) from None
    if figures.leaves(documents["pretrain"]).get("loss") is None:
        raise GateError(f"{files.PRETRAINING} has no loss; run `dvc repro`")


def _add(params: Params, registry: Registry, decision: dict[str, Any], kind: str) -> Version:
    from barlow.evaluation import onnx_file
    from barlow.production import gate

    encoder = Encoder(files.KINDS[kind])
    reduced = {path.name: path for path in sorted(files.REDUCED.glob("*.onnx"))}
    reduced = {name: path for name, path in reduced.items() if _is_of(encoder, path)}
    weights = {files.ENCODER.name: files.ENCODER} if onnx_file.is_of_weights(encoder) else {}
    card = {
        **encoder.metadata,
        "kind": kind,
        "classes": encoder.classes,
        "created": decision["time"],
        "metrics": metrics(kind),
        "replaces": decision["champion"],
        "sha256": decision["sha256"],
        "reduced": {name: files.sha256(path) for name, path in reduced.items()},
        "weights": {name: files.sha256(path) for name, path in weights.items()},
        "settings": json.loads(json.dumps(asdict(params))),
    }
    reference = io.BytesIO()
    np.save(reference, gate.reference(encoder, params.promote.reference_images))
    contents: dict[str, Path | bytes | str] = {
        f"{kind}.onnx": files.KINDS[kind],
        **reduced,
        **weights,
        "reference.npy": reference.getvalue(),
        "decision.json": json.dumps(decision, indent=2, sort_keys=True, allow_nan=False) + "\n",
        "README.md": describe(card, decision),
    }
    return registry.add(contents, card)


def _is_of(encoder: Encoder, path: Path) -> bool:
    """Say whether a file of lower precision was made from this encoder."""
    space = Encoder(path).metadata["space"]
    return space == f"{encoder.metadata['space']}-{path.stem}"


def describe(card: dict[str, Any], decision: dict[str, Any]) -> str:
    """Return the model card for people, in Markdown."""
    data = figures.build(Validation, card["metrics"]["validate"], str(files.VALIDATION))
    kind = card["kind"]
    measured = card["metrics"][METRICS[kind][-1]]
    latency = measured["speed"]["latency_ms"]
    candidates = {name: figures.build(Candidate, each, name) for name, each in decision["figures"].items()}
    checks = "\n".join(f"- {name}: {check['text']}" for name, check in decision["checks"].items())
    against = ""
    if kind == "classifier":
        row = figures.build(figures.Gain, measured["difference"], str(files.CLASSIFYING))
        against = f"\n\nAgainst the linear probe on the encoder that it began from: {row}."
    task = {"encoder": "image-feature-extraction", "classifier": "image-classification"}[kind]
    classes = f"Its logits are for {', '.join(card['classes'])}." if card["classes"] else "It has no classifier."
    taken = f"uint{card.get('bits', '8')} [batch, height, width, {card.get('channels', '3')}]"
    return f"""---
library_name: onnx
pipeline_tag: {task}
tags: [barlow-twins, self-supervised]
---
# An image {kind}, embedding space {card["space"]}

Made on {card["created"]} by barlow {card["version"]}, git revision {card.get("git_revision", "unknown")}. Input
`images` is {taken} of any size; output `embedding` is float32 [batch, {card["dim"]}]. {classes}
Embeddings of another space cannot be compared with these: after a change of {kind}, embed your images again.

## Data
{data.accepted.total:,} images, {data.accepted.by["pretrain"]:,} of them without labels, and
{data.quarantined.total:,} in quarantine; data hash {card["data_hash"]}.

## Measured
{tables.columns(candidates)}{against}

Top-1 accuracies are in percent, with 95 % intervals. One image takes {latency} ms on the machine that exported the
{kind}. All of this was measured on the data above; nothing is known of other images or classes.

## Why it was promoted
{decision["reason"]}
{checks}

To go back: `barlow rollback{_flag(kind)}`. The file's SHA-256 is {card["sha256"]}.
"""
