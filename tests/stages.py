"""What the stages write, written without them: a project folder that the report can be made in."""

import csv
import io

import numpy as np
import onnx
import pyarrow as pa
import torch
from dvclive import Live
from PIL import Image

from barlow.core import files, images, webdataset
from barlow.core.weights import save_weights
from barlow.data import manifest
from barlow.evaluation import features, intervals

HOSTILE = '<script>alert("1")</script>&\n,\u202e'
READABLE = HOSTILE.replace("\n", "\\n").replace("\u202e", "\\u202e")
CLASSES = ("bricks", "dots", "rings", "waves", HOSTILE)
ENCODERS = {"": "pretrained", "random_": "random", "pixels_": "pixels"}
FEW = {"labels_1": 5, "labels_5": 25, "labels_10": 50, "share_1": 5, "share_10": 40}  # setting: images


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


def write(classes=CLASSES, test=60, epochs=14, labelled=True, claimed=True):
    """Write what the other stages would, through their writers."""
    data(list(classes) if labelled else [], test)
    pretraining(epochs)
    evaluation(list(classes), test, labelled)
    export()
    files.write_json(files.REPORTS / "claims.json", claims() if claimed else {"claims": []})


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

    validation = {"images": 104, "accepted": 100, "quarantined": 4, "quarantined_decodable": 3, "quarantined_width": 1}
    validation |= {f"accepted_{split}": 10 for split in manifest.SPLITS}
    for name, success, severity, observed in (("decodable", True, "critical", 0.971), ("drift", False, "warning", 0.2)):
        validation |= {f"{name}_success": success, f"{name}_severity": severity, f"{name}_observed": observed}
        validation |= {f"{name}_bound": 0.5, f"{name}_unexpected": 0}
    files.write_json(files.REPORTS / "validate.json", validation)
    table(files.QUARANTINE, ["path", "reason"], [["a b/é.jpg", "not an image"], [f"{HOSTILE}.jpg", "width 8"]])
    files.QUARANTINED.mkdir()
    (files.QUARANTINED / "001.jpg").write_bytes(images.jpeg(noise(8, 8)))


def pretraining(epochs):
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
    files.write_json(files.REPORTS / "pretrain.json", {**row, "epochs": epochs, "seconds": 17.5 * epochs})

    rng = np.random.default_rng(0)
    z = rng.normal(size=(200, 64))
    before = np.corrcoef(z.T + 2 * rng.normal(size=200))
    after = np.corrcoef(z.T) * 0.9
    matrices = {"before": before, "during": (before + after) / 2, "after": after}
    save_weights(files.CORRELATION, {name: torch.tensor(m).float() for name, m in matrices.items()}, {})
    save_weights(files.ENCODER, {"w": torch.zeros(1)}, {"data": webdataset.digest(webdataset.tars("pretrain"))})


def evaluation(classes, test, labelled):
    """Draw features and predictions, and made-up figures that all differ, each with an interval."""
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

    metrics = {"classes": len(classes) * labelled, "test_images": test * labelled}
    metrics |= {"train_images": 10 * labelled, "val_images": 10 * labelled}
    for who, rank in (("", 87.654), ("random_", 9.876)):
        metrics |= {f"{who}effective_rank": rank, f"{who}feature_std": 0.71, f"{who}health_images": 1000}
        metrics |= {f"{who}alignment": 0.321, f"{who}uniformity": -2.345, f"{who}feature_correlation": 0.123}
    finetuned = {"seconds": 12.3}
    draws = []
    if labelled:
        names = ["linear", "knn", *FEW]
        for i, (prefix, encoder) in enumerate(ENCODERS.items()):
            metrics[f"{prefix}linear_l2"] = 0.001
            for j, name in enumerate(names):
                metrics |= accuracy(f"{prefix}{name}_top1", 58.76 - 17.1 * i - 2.3 * j)
            draws += [(encoder, name, FEW[name], k, 40 - 10 * i + k) for name in FEW for k in range(5)]
        metrics |= {f"{name}_images": images for name, images in FEW.items()}
        for i, name in enumerate(("finetuned_share_1", "scratch_share_1", "finetuned_share_10", "scratch_share_10")):
            finetuned |= accuracy(f"{name}_top1", 31.4 + 7 * i)
        finetuned |= accuracy("supervised_top1", 71.9) | {"supervised_images": 1000}
    files.write_json(files.REPORTS / "evaluate.json", metrics)
    files.write_json(files.REPORTS / "finetune.json", finetuned)
    table(files.FEW_LABELS, ["encoder", "setting", "images", "draw", "top1"], draws)


def accuracy(key, value):
    low, high = intervals.wilson_interval(value, 1000)
    return {key: value, f"{key}_low": low, f"{key}_high": high}


def export():
    figures = {"parity_cosine_min": 0.999999881, "latency_ms": 1.211, "images_per_second": 1259.6, "dim": 512}
    files.write_json(files.REPORTS / "export.json", figures)
    exported = onnx.helper.make_model(onnx.helper.make_graph([], "encoder", [], []))
    onnx.helper.set_model_props(exported, {"space": "0123456789abcdef", "classes": "[]"})
    files.ONNX.write_bytes(exported.SerializeToString())


def claims():
    """Return a document of three claims, one with a point of which no run ended."""

    def point(label, interval, *runs, base=False):
        figures = dict(zip(("mean", "low", "high"), interval, strict=True))
        return {"label": label, "base": base, "params": {"pretrain.batch_size": int(label)}, "runs": runs} | figures

    first = {"seed": 0, "linear_top1": 60.5, "experiment": "a-0"}
    points = [
        point("32", (61.25, 57.0, 65.5), first, {"seed": 1, "linear_top1": 62.0}, base=True),
        point(
            "64", (63.0, 62.0, 64.0), {"seed": 0, "linear_top1": 63.0}, {"seed": 1, "failed": "the loss is not finite"}
        ),
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
        "data": "synthetic",
    }
    return {**setting, "seeds": [0, 1], "metric": "linear_top1", "claims": entries}
