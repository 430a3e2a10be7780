import numpy as np
import pytest
import stages
from sklearn.metrics import confusion_matrix, precision_score, recall_score

from barlow.evaluation import intervals
from barlow.reporting import charts, results


def figures(*names, **more):
    """Metrics with the accuracies of those names, all different, each with an interval."""
    metrics = {"classes": 10, "train_images": 1000} | more
    for i, name in enumerate(names):
        metrics |= stages.accuracy(f"{name}_top1", 10.5 + 5 * i)
    return metrics


def test_settings_come_by_their_number_of_images():
    metrics = figures("linear", "labels_5", "share_2.5", labels_5_images=50, **{"share_2.5_images": 25})
    assert results.settings(metrics | {"labels_1_images": 10}) == {
        "share_2.5": ("2.5 %", 25),
        "labels_5": ("5 a class", 50),
        "linear": ("all", 1000),
    }
    assert results.settings({"train_images": 0}) == {}


def test_methods_hold_every_accuracy_but_those_by_class():
    names = ["linear", "random_linear", "pixels_knn", "share_10", "share_1", "finetuned_share_10", "scratch_share_1"]
    groups = results.methods(figures(*names, "supervised", "labels_5", share_10_images=100, share_1_images=10))
    assert [(group["title"], group["images"]) for group in groups] == [
        ("All labels of train", 1000),
        ("10 % of the labels", 100),
        ("1 % of the labels", 10),
    ]
    shown = [key for group in groups for rows in group["parts"].values() for key in rows]
    assert sorted(shown) == sorted(f"{name}_top1" for name in [*names, "supervised"])
    assert list(groups[1]["parts"]) == ["Linear probe on frozen features", "The whole network, trained"]


def test_the_few_label_curve_draws_of_two_equal_numbers_the_first(monkeypatch):
    drawn = {}
    monkeypatch.setattr(charts, "points", drawn.update)
    metrics = figures("linear", "labels_1", "share_1", "random_linear", labels_1_images=10, share_1_images=10)
    metrics |= stages.accuracy("finetuned_share_1_top1", 40.0) | stages.accuracy("supervised_top1", 70.0)
    rows = [["pretrained", "labels_1", "10", "0", "31.5"], ["pretrained", "labels_1", "10", "1", "33.5"]]
    few = results.few_labels(metrics, [*rows, ["random", "labels_1", "10", "0", "1.5"]])
    assert {name: [(p.x, p.y, list(p.dots)) for p in line] for name, line in drawn.items()} == {
        "pretrained": [(10, metrics["labels_1_top1"], [31.5, 33.5]), (1000, metrics["linear_top1"], [])],
        "random encoder": [(1000, metrics["random_linear_top1"], [])],
        "pretrained, then fine-tuned": [(10, 40.0, [])],
        "supervised": [(1000, 70.0, [])],
    }
    assert [name for _, _, name in few["settings"]] == ["labels_1", "share_1", "linear"]


def test_without_labels_there_is_no_curve():
    assert results.few_labels({"train_images": 0}, []) == {"chart": None, "settings": []}
    assert results.confusion([], []) is None


def test_classes_and_confusion_as_scikit_learn_counts_them():
    rng = np.random.default_rng(0)
    names = ["a", "b", "c", "never predicted", "never there"]
    actual = rng.integers(0, 4, 200)
    predicted = np.where(rng.random(200) < 0.5, actual, rng.integers(0, 3, 200))
    predicted[predicted == 3] = 4
    found = results.confusion([(names[a], names[b]) for a, b in zip(actual, predicted, strict=True)], names)
    assert found["counts"] == confusion_matrix(actual, predicted, labels=range(5)).tolist()
    rows = {row["name"]: row for row in found["by_class"]}
    assert set(rows) == set(names[:4])
    options = {"labels": range(5), "average": None, "zero_division": 0}
    for i, (recall, precision) in enumerate(
        zip(recall_score(actual, predicted, **options), precision_score(actual, predicted, **options), strict=True)
    ):
        if i < 4:
            row = rows[names[i]]
            assert row["recall"] == pytest.approx(100 * recall)
            assert (row["precision"] or 0) == pytest.approx(100 * precision)
            assert row["images"] == (actual == i).sum()
            assert (row["low"], row["high"]) == intervals.wilson_interval(row["recall"], row["images"])
    assert rows["never predicted"]["precision"] is None
    assert [row["recall"] for row in found["by_class"]] == sorted((r["recall"] for r in rows.values()), reverse=True)
    for kind_actual, kind_predicted, numbers in found["mistakes"]:
        assert {(names[actual[i]], names[predicted[i]]) for i in numbers} == {(kind_actual, kind_predicted)}
        assert len(numbers) == found["counts"][names.index(kind_actual)][names.index(kind_predicted)]


def test_of_many_classes_both_ends_are_shown():
    rows = [{"n": n} for n in range(31)]
    assert results.ends(rows[:30]) == [rows[:30]]
    assert results.ends(rows) == [rows[:15], rows[16:]]


def test_a_claim_is_laid_out_over_one_axis():
    document = stages.claims()
    claim = results.claim(document["claims"][0] | {"metric": "linear_top1"})
    first, second, failed = claim["rows"]
    low, high = 57.0 - 0.06 * 8.5, 65.5 + 0.06 * 8.5  # all that is seen, with a margin
    for value, place in (first["mean"], first["low"], first["high"], second["mean"]):
        assert place == pytest.approx(100 * (value - low) / (high - low), abs=0.01)
    assert first["dots"] == [pytest.approx(100 * (value - low) / (high - low), abs=0.01) for value in (60.5, 62.0)]
    assert len(second["dots"]) == 1
    assert "dots" not in failed
    assert claim["seeds"] == [0, 1]
    assert [text for _, text in claim["marks"]] == ["60", "65"]


def test_a_claim_of_which_no_run_ended():
    entry = {"metric": "linear_top1", "points": [{"label": "a", "mean": None, "runs": [{"seed": 3, "failed": "x"}]}]}
    claim = results.claim(entry)
    assert claim["seeds"] == [3]
    assert "dots" not in claim["rows"][0]
