import numpy as np
import pytest
import stages
from sklearn.metrics import confusion_matrix, precision_score, recall_score

from barlow.evaluation import intervals
from barlow.evaluation.figures import (
    Budget,
    Evaluation,
    FewLabels,
    FineTuned,
    FineTuning,
    Images,
    Network,
    Scores,
    Supervised,
)
from barlow.reporting import charts, results

FIVE, SHARE = Budget(5, None), Budget(None, 0.025)
ONE, PERCENT, TENTH = Budget(1, None), Budget(None, 0.01), Budget(None, 0.1)
UNTUNED = FineTuning(1.0, {}, None)


def evaluated(**encoders):
    return Evaluation(10, Images(1000, 300, 500), encoders, {})


def scores(first, few=None, linear=True, knn=True):
    """Return accuracies that all differ, each with an interval; `few` has the images per budget."""
    few = {
        str(budget): FewLabels(budget, images, stages.accuracy(first + 3 + i))
        for i, (budget, images) in enumerate((few or {}).items())
    }
    measured = [stages.accuracy(first + i) if there else None for i, there in enumerate((linear, knn))]
    return Scores(*measured, None, 0.001, few, None)


def tuned(budget, images, pretrained, random):
    networks = (Network(stages.accuracy(top1), 0.1) for top1 in (pretrained, random))
    return {str(budget): FineTuned(budget, images, *networks)}


def test_label_budgets_come_by_their_number_of_images():
    evaluation = evaluated(pretrained=scores(10.0, {FIVE: 50, SHARE: 25}))
    rows = results.label_budgets(evaluation)
    assert [(row.title, row.images) for row in rows] == [("2.5 %", 25), ("5 per class", 50), ("all", 1000)]
    assert rows[1].probes["pretrained"].key == "encoders.pretrained.few_labels.5 per class.linear"
    assert rows[1].probes["pretrained"].accuracy.top1 == 13.0
    assert results.label_budgets(evaluated(pretrained=scores(10.0, linear=False, knn=False))) == []


def test_methods_hold_every_accuracy_but_those_of_labels_per_class():
    evaluation = evaluated(
        pixels=scores(50.0, linear=False),
        pretrained=scores(10.0, {TENTH: 100, PERCENT: 10, FIVE: 50}, knn=False),
        random=scores(30.0, knn=False),
    )
    fine_tuned = tuned(TENTH, 100, 61.0, 62.0) | tuned(PERCENT, 10, 63.0, 64.0)
    supervised = Supervised(Network(stages.accuracy(70.0), 0.1), 3000)
    groups = results.methods(evaluation, FineTuning(1.0, fine_tuned, supervised))
    assert [(group["title"], group["images"]) for group in groups] == [
        ("All labels of train", 1000),
        ("10 % of the labels", 100),
        ("1 % of the labels", 10),
    ]
    shown = {m.key: m.accuracy.top1 for group in groups for rows in group["parts"].values() for m in rows.values()}
    assert shown == {
        "encoders.pretrained.linear": 10.0,
        "encoders.random.linear": 30.0,
        "encoders.pixels.knn": 51.0,
        "supervised.network.accuracy": 70.0,
        "encoders.pretrained.few_labels.10 %.linear": 13.0,
        "encoders.pretrained.few_labels.1 %.linear": 14.0,
        "fine_tuned.10 %.pretrained.accuracy": 61.0,
        "fine_tuned.10 %.random.accuracy": 62.0,
        "fine_tuned.1 %.pretrained.accuracy": 63.0,
        "fine_tuned.1 %.random.accuracy": 64.0,
    }
    assert {title: list(rows) for title, rows in groups[1]["parts"].items()} == {
        "Linear probe on frozen features": ["pretrained"],
        "The whole network, trained": ["pretrained, then fine-tuned", "from random weights"],
    }


def test_the_few_label_curve_draws_of_two_equal_numbers_the_first(monkeypatch):
    drawn = {}
    monkeypatch.setattr(charts, "points", drawn.update)
    evaluation = evaluated(pretrained=scores(10.0, {PERCENT: 10, ONE: 10}), random=scores(30.0))
    finetuning = FineTuning(1.0, tuned(PERCENT, 10, 40.0, 20.0), Supervised(Network(stages.accuracy(70.0), 0.1), 3000))
    rows = [["pretrained", "1 per class", "10", "0", "31.5"], ["pretrained", "1 per class", "10", "1", "33.5"]]
    results.few_labels(evaluation, finetuning, [*rows, ["random", "1 per class", "10", "0", "1.5"]])
    assert {name: [(p.x, p.y, list(p.dots)) for p in line] for name, line in drawn.items()} == {
        "pretrained": [(10, 14.0, [31.5, 33.5]), (1000, 10.0, [])],
        "random encoder": [(1000, 30.0, [])],
        "pretrained, then fine-tuned": [(10, 40.0, [])],
        "from random weights": [(10, 20.0, [])],
        "supervised": [(1000, 70.0, [])],
    }


def test_without_labels_there_is_no_curve():
    bare = evaluated(pretrained=scores(10.0, linear=False, knn=False))
    assert results.few_labels(bare, UNTUNED, []) is None
    assert [group["parts"] for group in results.methods(bare, UNTUNED)] == [{}]
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


def test_a_claim_is_laid_out_over_one_axis(smoke):
    document = stages.claims(smoke.ingest)
    claim = results.claim(document["claims"][0])
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
    entry = {"points": [{"label": "a", "mean": None, "runs": [{"seed": 3, "failed": "x"}]}]}
    claim = results.claim(entry)
    assert claim["seeds"] == [3]
    assert "dots" not in claim["rows"][0]


def test_encoders_of_any_name_are_shown_after_the_known_ones():
    evaluation = evaluated(v1=scores(40.0, {FIVE: 50}), pretrained=scores(10.0, {FIVE: 50}), pixels=scores(20.0))
    (group,) = results.methods(evaluation, UNTUNED)
    for part, first in (("Linear probe on frozen features", 0.0), ("Weighted kNN on frozen features", 1.0)):
        shown = {title: (m.key, m.accuracy.top1) for title, m in group["parts"][part].items()}
        kind = "linear" if first == 0 else "knn"
        assert shown == {
            "pretrained": (f"encoders.pretrained.{kind}", 10 + first),
            "raw pixels": (f"encoders.pixels.{kind}", 20 + first),
            "v1": (f"encoders.v1.{kind}", 40 + first),
        }
        assert list(shown) == ["pretrained", "raw pixels", "v1"]
    assert list(results.few_labels(evaluation, UNTUNED, [])["series"]) == ["pretrained", "raw pixels", "v1"]
