"""Write what the stages write, without running them: a project folder for the report."""

import csv
import io

import numpy as np
import onnx
import pyarrow as pa
import torch
from PIL import Image

from barlow.core import files, images, webdataset
from barlow.core.weights import save_weights
from barlow.data import manifest, sources, validation
from barlow.data.validation import Check, Counts, Validation
from barlow.evaluation import features, figures, intervals
from barlow.evaluation.figures import Accuracy, Budget

HOSTILE = '<script>alert("1")</script>&\n,\u202e'
READABLE = HOSTILE.replace("\n", "\\n").replace("\u202e", "\\u202e")
CLASSES = ("bricks", "dots", "rings", "waves", HOSTILE)
ENCODERS = ("pretrained", "random", "pixels")
SHARES = {Budget(None, 0.01): 5, Budget(None, 0.1): 40}  # labelled images
FEW = {Budget(1, None): 5, Budget(5, None): 25, Budget(10, None): 50} | SHARES


def noise(height, width):
    return np.asarray(Image.effect_noise((width, height), 50).convert("RGB"))


def samples(split, count, classes):
    for i in range(count):
        file = io.BytesIO()
        width, label = 24 + i % 3, i % len(classes) if classes else -1
        Image.fromarray(noise(24, width)).save(file, "JPEG")
        yield webdataset.Sample(f"{split}{i:020x}", file.getvalue(), "jpg", label, 24, width)


def table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write(classes=CLASSES, test=60, epochs=14, labelled=True, claimed=None):
    """Write what the other stages would, through their writers; `claimed` is the section `ingest` of the claims."""
    data(list(classes) if labelled else [], test)
    pretraining(epochs)
    evaluation(list(classes), test, labelled)
    export()
    files.write_json(files.CLAIMS, claims(claimed) if claimed else {"claims": []})


def data(known, test):
    rows = []
    for split, count in {"pretrain": 20, "train": 10, "val": 10, "test": test}.items():
        names = known if split != "pretrain" else []
        webdataset.write(files.SHARDS / f"{split}-000000.tar", samples(split, count, names))
        for i in range(count):
            row = dict.fromkeys(manifest.SCHEMA.names) | {"path": f"{split}/{i}", "split": split}
            rows.append(row | {"label": names[i % len(names)] if names else None})
    files.write_json(files.SHARDS / webdataset.CLASSES_FILE, known)
    manifest.write(pa.Table.from_pylist(rows, manifest.SCHEMA), files.ACCEPTED)

    accepted = Counts(100, dict.fromkeys(manifest.SPLITS, 10))
    quarantined = Counts(4, {"decodable": 3, "width": 1})
    checks = {"decodable": Check(True, "critical", 0.971, 0.5, 0), "drift": Check(False, "warning", 0.2, 0.5, 0)}
    validation.write(Validation(104, accepted, quarantined, checks))
    table(files.QUARANTINE, ["path", "reason"], [["a b/é.jpg", "not an image"], [f"{HOSTILE}.jpg", "width 8"]])
    files.QUARANTINED.mkdir()
    (files.QUARANTINED / "001.jpg").write_bytes(images.jpeg(noise(8, 8)))


def pretraining(epochs):
    from dvclive import Live  # here, since its import takes a second

    live = Live(str(files.REPORTS / "pretrain"), save_dvc_exp=False, dvcyaml=None)
    for epoch in range(epochs):
        row = {
            "loss": 40 + 400 / (epoch + 1),
            "invariance": 0.9 / (epoch + 1),
            "redundancy": 0.05 * np.exp(-((epoch - 2) ** 2) / 20) + 0.0062,
            "lr": float(0.3 * np.cos(epoch / max(epochs, 1) * np.pi / 2) ** 2) * (0.6 if epoch == 0 else 1),
            "std": 0.9,
            "samples_per_second": 412.3,
            "data_wait": 0.0123,
            "seconds": 17.5,
            "knn_val_top1": 61.3,
            "weight_norm": 60.0 - epoch,
            "gradient_norm": 9.0 / (epoch + 1),
        }
        for name, value in row.items():
            live.log_metric(name, float(value))
        live.next_step()
    files.write_json(files.PRETRAINING, {**row, "epochs": epochs, "steps": 109 * epochs, "seconds": 17.5 * epochs})

    rng = np.random.default_rng(0)
    z = rng.normal(size=(200, 64))
    before = np.corrcoef(z.T + 2 * rng.normal(size=200))
    after = np.corrcoef(z.T) * 0.9
    matrices = {"before": before, "during": (before + after) / 2, "after": after}
    save_weights(files.CORRELATION, {name: torch.tensor(m).float() for name, m in matrices.items()}, {})
    save_weights(files.ENCODER, {"w": torch.zeros(1)}, {"data": webdataset.digest(webdataset.tars("pretrain"))})


def evaluation(classes, test, labelled):
    """Write random features and predictions, and the metrics of `measured`."""
    rng = np.random.default_rng(0)

    def split(name, count):
        labels = torch.arange(count) % len(classes)
        vectors = torch.tensor(rng.normal(size=(count, 64))).float() + 3 * torch.eye(64)[labels % 64]
        keys = [f"{name}{i:020x}" for i in range(count)]
        return features.Split(vectors, labels if labelled else torch.full_like(labels, -1), keys)

    splits = {"train": split("train", 10 * labelled), "val": split("val", 10 * labelled), "test": split("test", test)}
    features.save("pretrained", splits)
    labels = torch.arange(test) % len(classes)
    wrong = torch.tensor(rng.random(test) < 0.4, dtype=torch.bool)
    predictions = torch.where(wrong, (labels * 2 + 1) % len(classes), labels)
    pairs = [(classes[a], classes[b]) for a, b in zip(labels, predictions, strict=True)] if labelled else []
    table(files.CONFUSION, ["actual", "predicted"], pairs)

    evaluated, tuned, draws = measured(len(classes), test, labelled)
    figures.write(files.EVALUATION, evaluated)
    figures.write(files.FINETUNING, tuned)
    table(files.FEW_LABELS, ["encoder", "budget", "images", "draw", "top1"], draws)


def measured(classes, test, labelled=True):
    """Return evaluation, fine-tuning and draws: made-up accuracies, all different, each with an interval."""
    encoders, fine_tuned, supervised, draws = {}, {}, None, []
    for i, encoder in enumerate(ENCODERS):
        health = None
        if encoder != "pixels":
            rank = 87.654 if encoder == "pretrained" else 9.876
            health = figures.Health(1000, rank, std=0.71, correlation=0.123, alignment=0.321, uniformity=-2.345)
        top1 = [accuracy(58.76 - 17.1 * i - 2.3 * j) for j in range(2 + len(FEW))]
        few = {
            str(budget): figures.FewLabels(budget, images, each)
            for (budget, images), each in zip(FEW.items(), top1[2:], strict=True)
        }
        encoders[encoder] = figures.Scores(None, None, None, None, {}, health)
        if labelled:
            encoders[encoder] = figures.Scores(top1[0], top1[1], None, 0.001, few, health)
            draws += [(encoder, str(budget), FEW[budget], k, 40 - 10 * i + k) for budget in FEW for k in range(5)]
    if labelled:
        for i, (budget, images) in enumerate(SHARES.items()):
            pretrained, random = (figures.Network(accuracy(31.4 + 14 * i + 7 * j), 0.01) for j in range(2))
            fine_tuned[str(budget)] = figures.FineTuned(budget, images, pretrained, random)
        supervised = figures.Supervised(figures.Network(accuracy(71.9), 0.1), 1000)
    images = figures.Images(10 * labelled, 10 * labelled, test * labelled)
    gains = {name: {kind: figures.Gain(9.1, 5.5, 12.5) for kind in ("linear", "knn")} for name in ENCODERS[1:]}
    evaluated = figures.Evaluation(classes * labelled, images, encoders, gains if labelled else {})
    return evaluated, figures.FineTuning(12.3, fine_tuned, supervised), draws


def accuracy(top1):
    """Return an accuracy with Wilson's interval over 1,000 images."""
    return Accuracy(top1, *intervals.wilson_interval(top1, 1000))


def exporting(cosine_min=1.0):
    """Return the metrics of an export."""
    precision = {"float32": figures.Precision(figures.Top1(50.0, 40.0), 100.0, 19_000_000, True)}
    parity, speed = figures.Parity(cosine_min, 1e-6, 9, True), figures.Speed(1.211, 1259.6)
    return figures.Exporting(parity, speed, precision, 512, 4_900_000)


def export():
    figures.write(files.EXPORTING, exporting(0.999999881))
    exported = onnx.helper.make_model(onnx.helper.make_graph([], "encoder", [], []))
    onnx.helper.set_model_props(exported, {"space": "0123456789abcdef", "classes": "[]"})
    files.ONNX.write_bytes(exported.SerializeToString())


def claims(ingest):
    """Return a document of three claims on the data of `ingest`; all runs of one of their points failed."""

    def point(label, interval, *runs, base=False):
        figures = dict(zip(("mean", "low", "high"), interval, strict=True))
        return {"label": label, "base": base, "params": {"pretrain.batch_size": int(label)}, "runs": runs} | figures

    first = {"seed": 0, "top1": 60.5, "experiment": "a-0"}
    points = [
        point("32", (61.25, 57.0, 65.5), first, {"seed": 1, "top1": 62.0}, base=True),
        point("64", (63.0, 62.0, 64.0), {"seed": 0, "top1": 63.0}, {"seed": 1, "failed": "the loss is not finite"}),
        point("128", (None, None, None), {"seed": 0, "failed": "out of memory"}),
    ]
    words = {"title": "No large batches needed", "claim": "The paper says so.", "rule": "At most 2 points less."}
    claim = {**words, "x_label": "batch size", "text": "It was 61.3 %.", "points": points}
    entries = [{**claim, "name": v.replace(" ", "_"), "verdict": v} for v in ("shown", "not shown", "contradicted")]
    setting = {
        "preset": "cpu",
        "revision": "0123abcd",
        "hardware": "2 processors",
        "seconds": 1234.5,
        "data": sources.identity(ingest),
    }
    return {**setting, "seeds": [0, 1], "claims": entries}
