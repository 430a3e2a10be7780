import csv

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
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


def accuracies(metrics, encoder):
    """Return an encoder's accuracies by what was measured."""
    scores = metrics["encoders"][encoder]
    few = {name: each["linear"] for name, each in scores["few_labels"].items()}
    return {"linear": scores["linear"], "knn": scores["knn"], **few}


@pytest.fixture
def metrics(extracted, smoke):
    evaluate.run(smoke)
    return files.read_json("reports/evaluate.json")


def test_the_linear_probe_is_scikit_learns(metrics):
    """From the features to the figure, with the l2 that was chosen."""
    train, test = (features.load("pretrained", name) for name in ("train", "test"))
    scaler = StandardScaler().fit(train.features)
    pretrained = metrics["encoders"]["pretrained"]
    c = 1 / (pretrained["l2"] * len(train.labels))
    oracle = LogisticRegression(C=c, tol=1e-8, max_iter=10_000).fit(scaler.transform(train.features), train.labels)
    linear = pretrained["linear"]
    assert linear["top1"] == pytest.approx(100 * oracle.score(scaler.transform(test.features), test.labels))
    assert linear["low"] < linear["top1"] < linear["high"]


def test_the_head_and_the_confusion_are_those_of_the_probe(metrics):
    test, (head, metadata) = features.load("pretrained", "test"), load_weights(files.HEAD)
    predictions = (test.features @ head["weight"].T + head["bias"]).argmax(1)
    top1 = metrics["encoders"]["pretrained"]["linear"]["top1"]
    assert top1 == pytest.approx(100 * (predictions == test.labels).double().mean().item())
    assert metadata["classes"] == CLASSES
    with files.CONFUSION.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["actual"] for row in rows] == [CLASSES[i] for i in test.labels]
    assert [row["predicted"] for row in rows] == [CLASSES[i] for i in predictions]


def test_knn_on_val_is_scikit_learns_and_never_sees_test(metrics, smoke):
    """With weights by similarity, over neighbours in the angle between features."""
    train, val = (features.load("pretrained", name) for name in ("train", "val"))
    temperature = smoke.evaluate.knn_temperature
    oracle = KNeighborsClassifier(
        smoke.evaluate.knn_k, metric="cosine", algorithm="brute", weights=lambda far: np.exp(-far / temperature)
    )
    oracle.fit(train.features, train.labels)
    knn_val = metrics["encoders"]["pretrained"]["knn_val"]
    assert knn_val["top1"] == pytest.approx(100 * oracle.score(val.features, val.labels))
    features.save("pretrained", clusters(1.2, "test"))
    evaluate.run(smoke)
    assert files.read_json("reports/evaluate.json")["encoders"]["pretrained"]["knn_val"] == knn_val


def test_baselines_have_the_same_figures(metrics):
    assert list(metrics["encoders"]) == ["pixels", "pretrained", "random"]
    pretrained, random, pixels = (accuracies(metrics, name) for name in ("pretrained", "random", "pixels"))
    assert {*pretrained} == {*random} == {*pixels} == {"linear", "knn", "1 per class", "5 per class", "10 %"}
    for name, accuracy in pretrained.items():
        assert accuracy["top1"] > random[name]["top1"] > 0
        assert 0 <= pixels[name]["low"] <= pixels[name]["top1"] <= pixels[name]["high"]
    assert metrics["images"] == SIZES
    for scores in metrics["encoders"].values():
        few = scores["few_labels"]
        assert {name: each["images"] for name, each in few.items()} == {"1 per class": 4, "5 per class": 20, "10 %": 8}
        assert few["5 per class"]["budget"] == {"per_class": 5, "share": None}
        assert few["10 %"]["budget"] == {"per_class": None, "share": 0.1}
    assert metrics["encoders"]["pixels"]["health"] is None


def test_gains_are_the_differences_on_the_same_images(metrics, smoke):
    assert [(name, *sorted(kinds)) for name, kinds in sorted(metrics["gains"].items())] == [
        ("pixels", "knn", "linear"),
        ("random", "knn", "linear"),
    ]
    k, right = smoke.evaluate.knn_k, {}
    for encoder in ("pretrained", "random"):
        train, test = (features.load(encoder, name) for name in ("train", "test"))
        weights = {"weights": lambda d: np.exp((1 - d) / smoke.evaluate.knn_temperature)}
        oracle = KNeighborsClassifier(k, metric="cosine", **weights).fit(train.features.double(), train.labels)
        right[encoder] = oracle.predict(test.features.double()) == test.labels.numpy()
    only = [(right[a] & ~right[b]).sum() for a, b in (("pretrained", "random"), ("random", "pretrained"))]
    low, high = intervals.paired_interval(*only, 60)
    assert metrics["gains"]["random"]["knn"] == pytest.approx(
        {"points": 100 * (only[0] - only[1]) / 60, "low": low, "high": high}
    )
    for name, gain in metrics["gains"].items():
        top1 = [metrics["encoders"][each]["linear"]["top1"] for each in ("pretrained", name)]
        assert gain["linear"]["points"] == pytest.approx(top1[0] - top1[1])


def test_the_verdict_is_printed_below_the_table(extracted, smoke, capsys):
    evaluate.run(smoke)
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("Pretraining paid: ")
    assert said[-1].startswith("note: The linear probe's l2 was chosen on 40 labelled images of val.")
    features.save("pixels", {name: features.load("pretrained", name) for name in SIZES})
    evaluate.run(smoke)
    said = capsys.readouterr().out
    assert "the encoder is no better than pixels by linear probe and no better than pixels by kNN.\n" in said
    assert "What to try, in this order:\n  1. `barlow recommend`" in said


def test_few_label_probes_are_means_over_draws(metrics):
    with files.FEW_LABELS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 2  # encoders, budgets, draws
    for encoder in ("pretrained", "random", "pixels"):
        top1 = [float(row["top1"]) for row in rows if (row["encoder"], row["budget"]) == (encoder, "5 per class")]
        accuracy = accuracies(metrics, encoder)["5 per class"]
        assert accuracy["top1"] == pytest.approx(np.mean(top1))
        assert (accuracy["low"], accuracy["high"]) == intervals.mean_interval(top1, 60)
    top1 = {name: accuracy["top1"] for name, accuracy in accuracies(metrics, "pretrained").items()}
    assert top1["1 per class"] < top1["5 per class"] < top1["linear"] + 1e-9


def test_no_draws_no_few_label_probes(extracted, smoke, change):
    evaluate.run(change(smoke, "evaluate", draws=0))
    encoders = files.read_json("reports/evaluate.json")["encoders"]
    assert [scores["few_labels"] for scores in encoders.values()] == [{}] * 3


def test_other_weights_have_the_same_figures(metrics, smoke):
    features.save("swav.v2", clusters(1.5))
    evaluate.run(smoke)
    again = files.read_json("reports/evaluate.json")
    assert again["encoders"]["swav.v2"].keys() == metrics["encoders"]["pretrained"].keys()
    assert again["gains"]["swav.v2"].keys() == {"linear", "knn"}
    assert {**again["encoders"], "swav.v2": None} == {**metrics["encoders"], "swav.v2": None}


def test_baselines_can_be_left_out(metrics, smoke, change):
    for name in ("random", "pixels"):
        (files.FEATURES / f"{name}.safetensors").unlink()
    evaluate.run(change(smoke, "extract", baselines=False))
    kept = {"pretrained": metrics["encoders"]["pretrained"]}
    assert files.read_json("reports/evaluate.json") == metrics | {"encoders": kept, "gains": {}}


def test_it_is_deterministic(metrics, smoke):
    before = [path.read_bytes() for path in (files.REPORTS / "evaluate.json", files.HEAD, files.FEW_LABELS)]
    evaluate.run(smoke)
    assert [path.read_bytes() for path in (files.REPORTS / "evaluate.json", files.HEAD, files.FEW_LABELS)] == before


def test_nothing_that_is_fitted_or_chosen_sees_test_labels(metrics, smoke):
    """Shuffled test labels change the accuracy and nothing else."""
    head, before = files.HEAD.read_bytes(), metrics["encoders"]["pretrained"]
    splits = clusters(1.2)
    labels = torch.tensor(np.random.default_rng(1).permutation(splits["test"].labels))
    features.save("pretrained", splits | {"test": splits["test"]._replace(labels=labels)})
    evaluate.run(smoke)
    assert files.HEAD.read_bytes() == head
    again = files.read_json("reports/evaluate.json")["encoders"]["pretrained"]
    assert again["l2"] == before["l2"]
    assert again["linear"]["top1"] < before["linear"]["top1"] - 20


@pytest.mark.parametrize("split", list(SIZES))
def test_without_labels_health_is_all(tmp_path, monkeypatch, smoke, split, capsys):
    monkeypatch.chdir(tmp_path)
    write(split)
    evaluate.run(smoke)
    metrics = files.read_json("reports/evaluate.json")
    scores = metrics["encoders"]["pretrained"]
    assert (scores["linear"], scores["knn"], scores["l2"], scores["few_labels"]) == (None, None, None, {})
    assert (scores["knn_val"] is None) == (split != "test")  # which needs no labels of test
    assert metrics["images"][split] == 0
    assert metrics["gains"] == {}
    health = metrics["encoders"]["pretrained"]["health"]
    assert health["effective_rank"] > 1
    assert health["alignment"] > 0 > health["uniformity"]
    assert load_weights(files.HEAD) == ({}, {"classes": []})
    assert files.CONFUSION.read_text().splitlines() == ["actual,predicted"]
    assert "no labels" in capsys.readouterr().out


def test_without_features_it_says_what_to_run(tmp_path, monkeypatch, smoke):
    monkeypatch.chdir(tmp_path)
    files.write_json(files.SHARDS / "classes.json", CLASSES)
    with pytest.raises(UserError, match=r"data/features is missing; run `barlow extract`"):
        evaluate.run(smoke)
