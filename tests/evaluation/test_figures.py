from dataclasses import asdict
from pathlib import Path

import pytest
import stages

from barlow.core import files
from barlow.core.errors import UserError
from barlow.evaluation import figures
from barlow.evaluation.figures import Budget, Evaluation, Exporting, FineTuning

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_written_is_read_back(labelled):
    evaluation, finetuning, _ = stages.measured(5, 60, labelled)
    for metrics in (evaluation, finetuning, stages.exporting()):
        path = Path("metrics.json")
        figures.write(path, metrics)
        assert figures.read(type(metrics), path) == metrics


def test_the_json_is_nested_by_what_it_measures():
    evaluation, _, _ = stages.measured(5, 60)
    figures.write(files.EVALUATION, evaluation)
    document = files.read_json("reports/evaluate.json")
    assert document["images"] == {"train": 10, "val": 10, "test": 60}
    few = document["encoders"]["random"]["few_labels"]["10 %"]
    assert few["budget"] == {"per_class": None, "share": 0.1}
    assert {*few["linear"]} == {"top1", "low", "high"}
    assert document["encoders"]["pixels"]["health"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"].pop("val"), r"images\.val is missing"),
        (lambda d: d["encoders"]["pretrained"]["linear"].update(top1="a"), r"encoders\.pretrained\.linear\.top1"),
        (lambda d: d.update(knn_top1=1.0), "knn_top1"),
    ],
)
def test_other_keys_or_values_are_named_with_the_file(change, message):
    document = asdict(stages.measured(5, 60)[0])
    change(document)
    files.write_json("old.json", document)
    with pytest.raises(UserError, match=rf"old\.json.*{message}"):
        figures.read(Evaluation, Path("old.json"))


def test_budgets_in_words_and_as_the_amount_to_draw():
    assert [str(budget) for budget in (Budget(1, None), Budget(None, 0.1), Budget(None, 1e-7))] == [
        "1 per class",
        "10 %",
        "1e-05 %",
    ]
    assert (Budget(5, None).each, Budget(None, 0.25).each) == (5, 0.25)


def test_leaves_have_dotted_names_and_lists_are_whole():
    assert figures.leaves({"a": {"b": 1, "c": {"d": None}}, "e": [1, {"f": 2}]}) == {
        "a.b": 1,
        "a.c.d": None,
        "e": [1, {"f": 2}],
    }


def test_the_committed_metrics_are_of_this_shape():
    """Their values may be those of any run."""
    for kind, path in {Evaluation: "evaluate", FineTuning: "finetune", Exporting: "export"}.items():
        assert (ROOT / f"reports/{path}.json").exists()
        assert {*files.read_json(ROOT / f"reports/{path}.json")} == {*kind.__dataclass_fields__}
