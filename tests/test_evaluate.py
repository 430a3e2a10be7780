import csv

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from barlow import evaluate
from barlow.core import files
from barlow.core.errors import UserError
from barlow.core.weights import load_weights
from barlow.evaluation import features, intervals
from barlow.evaluation.features import Split

CLASSES = ["a", "b", "c", "d"]
SIZES = {"train": 80, "val": 40, "test": 60}


def clusters(spread, *unlabelled):
    """Features of four classes, the farther apart the smaller `spread`; some splits without labels."""
    rng, splits = np.random.default_rng(0), {}
    centres = rng.normal(size=(4, 16))
    for name, n in SIZES.items():
        labels = np.arange(n) % 4
        x = torch.tensor(centres[labels] + spread * rng.normal(size=(n, 16)), dtype=torch.float32)
        known = torch.full((n,), -1) if name in unlabelled else torch.tensor(labels)
        splits[name] = Split(x, known, [f"{name}{i:04d}" for i in range(n)])
    views, nothing = splits["val"].features + 0, torch.zeros(0, dtype=torch.long)
    splits["health"] = Split(views - 0.1, nothing, [])
    splits |= {"view_a": Split(views, nothing, []), "view_b": Split(views + 0.1, nothing, [])}
    return splits


def write(*unlabelled):
    files.write_json(files.SHARDS / "classes.json", CLASSES)
    for encoder, spread in {"pretrained": 1.2, "random": 3.0}.items():
        features.save(encoder, clusters(spread, *unlabelled))
    whole = clusters(6.0, *unlabelled)
    features.save("pixels", {n: whole[n]._replace(features=(whole[n].features * 5 + 128).byte()) for n in SIZES})


@pytest.fixture
def extracted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write()


@pytest.fixture
def metrics(extracted, smoke):
    evaluate.run(smoke)
    return files.read_json("reports/evaluate.json")


def test_the_linear_probe_is_scikit_learns(metrics):
    """From the features to the figure, with the l2 that was chosen."""
    train, test = (features.load("pretrained", name) for name in ("train", "test"))
    scaler = StandardScaler().fit(train.features)
    c = 1 / (metrics["linear_l2"] * len(train.labels))
    oracle = LogisticRegression(C=c, tol=1e-8, max_iter=10_000).fit(scaler.transform(train.features), train.labels)
    assert metrics["linear_top1"] == pytest.approx(100 * oracle.score(scaler.transform(test.features), test.labels))
    assert metrics["linear_top1_low"] < metrics["linear_top1"] < metrics["linear_top1_high"]


def test_the_head_and_the_confusion_are_those_of_the_probe(metrics):
    test, (head, metadata) = features.load("pretrained", "test"), load_weights(files.HEAD)
    predictions = (test.features @ head["weight"].T + head["bias"]).argmax(1)
    assert metrics["linear_top1"] == pytest.approx(100 * (predictions == test.labels).double().mean().item())
    assert metadata["classes"] == CLASSES
    with files.CONFUSION.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["actual"] for row in rows] == [CLASSES[i] for i in test.labels]
    assert [row["predicted"] for row in rows] == [CLASSES[i] for i in predictions]


def test_baselines_have_the_same_figures(metrics):
    own = {name for name in metrics if name.endswith("_top1") and not name.startswith(("random_", "pixels_"))}
    assert own == {"linear_top1", "knn_top1", "labels_1_top1", "labels_5_top1", "share_10_top1"}
    for name in own:
        assert metrics[name] > metrics[f"random_{name}"] > 0
        assert 0 <= metrics[f"pixels_{name}_low"] <= metrics[f"pixels_{name}"] <= metrics[f"pixels_{name}_high"]
    assert {name: metrics[f"{name}_images"] for name in ("train", "val", "test")} == SIZES
    assert {name: metrics[f"{name}_images"] for name in ("labels_1", "labels_5", "share_10")} == {
        "labels_1": 4,
        "labels_5": 20,
        "share_10": 8,
    }


def test_few_label_probes_are_means_over_draws(metrics):
    with files.FEW_LABELS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 2  # encoders, settings, draws
    for prefix, encoder in {"": "pretrained", "random_": "random", "pixels_": "pixels"}.items():
        top1 = [float(row["top1"]) for row in rows if (row["encoder"], row["setting"]) == (encoder, "labels_5")]
        assert metrics[f"{prefix}labels_5_top1"] == pytest.approx(np.mean(top1))
        low, high = intervals.mean_interval(top1, 60)
        assert (metrics[f"{prefix}labels_5_top1_low"], metrics[f"{prefix}labels_5_top1_high"]) == (low, high)
    assert metrics["labels_1_top1"] < metrics["labels_5_top1"] < metrics["linear_top1"] + 1e-9


def test_no_draws_no_few_label_probes(extracted, smoke, change):
    evaluate.run(change(smoke, "evaluate", draws=0))
    assert not [name for name in files.read_json("reports/evaluate.json") if name.startswith(("labels", "share"))]


def test_baselines_can_be_left_out(metrics, smoke, change):
    for name in ("random", "pixels"):
        (files.FEATURES / f"{name}.safetensors").unlink()
    evaluate.run(change(smoke, "extract", baselines=False))
    kept = {name: value for name, value in metrics.items() if not name.startswith(("random_", "pixels_"))}
    assert files.read_json("reports/evaluate.json") == kept


def test_it_is_deterministic(metrics, smoke):
    before = [path.read_bytes() for path in (files.REPORTS / "evaluate.json", files.HEAD, files.FEW_LABELS)]
    evaluate.run(smoke)
    assert [path.read_bytes() for path in (files.REPORTS / "evaluate.json", files.HEAD, files.FEW_LABELS)] == before


def test_nothing_that_is_fitted_or_chosen_sees_test_labels(metrics, smoke):
    """Shuffled test labels change the accuracy and nothing else."""
    head, l2 = files.HEAD.read_bytes(), metrics["linear_l2"]
    splits = clusters(1.2)
    labels = torch.tensor(np.random.default_rng(1).permutation(splits["test"].labels))
    features.save("pretrained", splits | {"test": splits["test"]._replace(labels=labels)})
    evaluate.run(smoke)
    assert files.HEAD.read_bytes() == head
    again = files.read_json("reports/evaluate.json")
    assert again["linear_l2"] == l2
    assert again["linear_top1"] < metrics["linear_top1"] - 20


@pytest.mark.parametrize("split", list(SIZES))
def test_without_labels_health_is_all(tmp_path, monkeypatch, smoke, split, capsys):
    monkeypatch.chdir(tmp_path)
    write(split)
    evaluate.run(smoke)
    metrics = files.read_json("reports/evaluate.json")
    assert not [name for name in metrics if "top1" in name]
    assert metrics[f"{split}_images"] == 0
    assert metrics["effective_rank"] > 1
    assert metrics["alignment"] > 0 > metrics["uniformity"]
    assert load_weights(files.HEAD) == ({}, {"classes": []})
    assert files.CONFUSION.read_text().splitlines() == ["actual,predicted"]
    assert "no labels" in capsys.readouterr().out


def test_without_features_it_says_what_to_run(tmp_path, monkeypatch, smoke):
    monkeypatch.chdir(tmp_path)
    files.write_json(files.SHARDS / "classes.json", CLASSES)
    with pytest.raises(UserError, match=r"data/features/random\.safetensors is missing; run `barlow extract`"):
        evaluate.run(smoke)
