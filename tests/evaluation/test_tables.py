from dataclasses import replace

from barlow.evaluation import tables
from barlow.evaluation.figures import (
    Accuracy,
    Budget,
    Candidate,
    Evaluation,
    FewLabels,
    FineTuned,
    FineTuning,
    Health,
    Images,
    Network,
    Scores,
    Supervised,
)

LINEAR, KNN = Accuracy(70.12, 67.2, 72.9), Accuracy(60.0, 57.0, 63.0)
SCORES = Scores(LINEAR, KNN, None, 0.001, {}, Health(300, 31.3, 0.5, 0.1, 0.2, -2.5))
BARE = Scores(None, None, None, None, {}, SCORES.health)


def evaluated(**encoders):
    return Evaluation(4, Images(40, 20, 20), encoders, {})


def few(images):
    """Return few-label probes by their budgets."""
    return {str(budget): FewLabels(budget, n, Accuracy(1.0, 0.5, 2.0)) for budget, n in images.items()}


def network(top1):
    return Network(Accuracy(top1, 1.0, 99.0), 0.1)


def tuned(budget, images, pretrained=2.0, random=3.0):
    return {str(budget): FineTuned(budget, images, network(pretrained), network(random))}


def test_the_table_shows_the_accuracies():
    random = replace(SCORES, linear=Accuracy(28.6, 67.2, 72.9))
    table = tables.table(evaluated(pretrained=SCORES, random=random), None)
    assert "70.1 (67.2 to 72.9)" in table
    assert "28.6 (67.2 to 72.9)" in table
    assert "31.30" in table


def test_rows_are_in_the_order_of_the_labels_they_need():
    tenth = Budget(None, 0.1)
    images = {Budget(1, None): 4, Budget(10, None): 40, tenth: 12, Budget(None, 0.005): 5, Budget(None, 1e-7): 3}
    images |= {Budget(None, 0.5): 40}
    scores = replace(SCORES, few_labels=few(images))
    finetuning = FineTuning(1.0, tuned(tenth, 12), Supervised(network(4.0), 100))
    assert list(tables.rows(evaluated(pretrained=scores, random=scores), finetuning)) == [
        "linear probe",
        "weighted kNN",
        "1e-05 % of labels",
        "1 label per class",
        "0.5 % of labels",
        "10 % of labels",
        "10 labels per class",
        "50 % of labels",
        "fine-tuned, 10 % of labels",
        "supervised, all labels",
    ]


def test_each_accuracy_is_in_its_column():
    pixels = replace(SCORES, linear=None, knn=Accuracy(93.0, 1.0, 99.0), health=None)
    finetuning = FineTuning(1.0, tuned(Budget(None, 0.1), 12, 90.0, 91.0), Supervised(network(92.0), 100))
    evaluation = evaluated(pixels=pixels, pretrained=SCORES, random=SCORES)
    lines = {line[:26].strip(): line[26:] for line in tables.table(evaluation, finetuning).splitlines()}
    assert lines["fine-tuned, 10 % of labels"].split()[0::4] == ["90.0", "91.0"]
    assert lines["supervised, all labels"].strip() == "92.0 (1.0 to 99.0)"
    assert len(lines["supervised, all labels"]) == 44  # the second column
    assert lines["weighted kNN"].split()[0::4] == ["60.0", "60.0", "93.0"]


def test_the_gates_table_has_a_column_per_encoder():
    candidates = {
        "challenger": Candidate(None, None, Accuracy(50.0, 40.0, 60.0), 12.34, 0.5),
        "v1": Candidate(None, None, None, 1.5, 0.25),
    }
    assert tables.columns(candidates).splitlines() == [
        "| | challenger | v1 |",
        "|---|---|---|",
        "| weighted kNN | 50.0 (40.0 to 60.0) |  |",
        "| effective rank | 12.34 | 1.5 |",
        "| standard deviation | 0.5 | 0.25 |",
    ]


def test_without_labels_health_alone_is_shown():
    table = tables.table(evaluated(pretrained=BARE), FineTuning(1.0, {}, None))
    assert "no labels" in table
    assert "effective rank" in table
    assert "linear probe" not in table


def test_without_baselines_their_columns_are_empty():
    lines = tables.table(evaluated(pretrained=SCORES), None).splitlines()
    assert [line[26:].split() for line in lines[1:]] == [
        ["70.1", "(67.2", "to", "72.9)"],
        ["60.0", "(57.0", "to", "63.0)"],
        ["31.30"],
        ["0.20"],
        ["-2.50"],
    ]


def test_other_encoders_have_columns_of_their_own_after_the_known_ones():
    name = "a-name-longer-than-a-column"
    others = {name: replace(SCORES, linear=Accuracy(55.5, 1.0, 99.0), health=None), "b": BARE}
    table = tables.table(evaluated(b=others["b"], pixels=SCORES, pretrained=SCORES, **{name: others[name]}), None)
    header, linear, _, rank, *_ = table.splitlines()
    assert header.endswith(f"{'pixels':>22}  {name}{'b':>22}")
    end = 26 + 3 * 22 + len(name) + 2
    assert linear[:end].endswith("55.5 (1.0 to 99.0)")
    assert linear[end:] == ""
    assert rank[end:] == f"{'31.30':>22}"
    assert list(tables.titles(evaluated(b=BARE, pretrained=BARE, a=BARE))) == [
        "pretrained",
        "random",
        "pixels",
        "a",
        "b",
    ]
