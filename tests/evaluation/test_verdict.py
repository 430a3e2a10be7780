import pytest

from barlow.evaluation import verdict
from barlow.evaluation.figures import Accuracy, Evaluation, Gain, Images, Scores

UP, EVEN, DOWN = Gain(9.0, 6.0, 12.0), Gain(1.0, -1.5, 3.5), Gain(-15.0, -18.0, -12.0)
ACCURACY = Accuracy(60.0, 57.0, 63.0)
SCORES = Scores(ACCURACY, ACCURACY, None, 0.01, {}, None)


def evaluated(val=300, labelled=True, **gains):
    scores = SCORES if labelled else Scores(None, None, None, None, {}, None)
    return Evaluation(4, Images(40, val, 20), dict.fromkeys(("pretrained", *gains), scores), gains)


def both(linear, knn):
    return {"knn": knn, "linear": linear}


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (Gain(1.0, 0.1, 2.0), "better than"),
        (Gain(1.0, 0.0, 2.0), "no better than"),
        (Gain(0.0, -1.0, 1.0), "no better than"),
        (Gain(-1.0, -2.0, 0.0), "no better than"),
        (Gain(-1.0, -2.0, -0.1), "worse than"),
    ],
)
def test_the_interval_decides_on_the_word(gain, said):
    assert verdict.word(gain) == said


def test_pretraining_that_paid():
    found = verdict.verdict(evaluated(random=both(UP, UP), pixels=both(UP, UP)))
    assert found.paid
    assert found.headline == (
        "Pretraining paid: on these images the encoder is better than the same network untrained and pixels."
    )
    assert found.tries == ()
    assert found.gains[3] == "Better than pixels by kNN: +9.0 points (+6.0 to +12.0)"


def test_one_measure_that_is_no_better_is_told():
    found = verdict.verdict(evaluated(pixels=both(UP, EVEN), random=both(UP, UP)))
    assert not found.paid
    assert found.headline == (
        "Pretraining did not pay everywhere: on these images the encoder is no better than pixels by kNN."
    )
    assert [text.partition(":")[0] for text in found.gains] == [
        "Better than the same network untrained by linear probe",
        "Better than the same network untrained by kNN",
        "Better than pixels by linear probe",
        "No better than pixels by kNN",
    ]
    words = ["barlow recommend", "pretrain.epochs", "barlow tune", "views.size", "More images"]
    assert [word in text for word, text in zip(words, found.tries, strict=True)] == [True] * 5


def test_all_that_is_not_better_is_listed():
    found = verdict.verdict(evaluated(random=both(EVEN, DOWN), pixels=both(DOWN, EVEN)))
    assert found.headline == (
        "Pretraining did not pay: on these images the encoder is no better than the same network untrained by linear "
        "probe, worse than the same network untrained by kNN, worse than pixels by linear probe and no better than "
        "pixels by kNN."
    )


def test_another_encoder_is_named():
    found = verdict.verdict(evaluated(random=both(UP, UP), v1=both(DOWN, UP)))
    assert found.headline.endswith("the encoder is worse than v1 by linear probe.")
    assert len(found.gains) == 4


def test_without_gains_there_is_no_verdict():
    assert verdict.verdict(evaluated()) is None
    assert verdict.lines(evaluated()) == []


@pytest.mark.parametrize(
    ("val", "noted"), [(1, "1 labelled image of val"), (49, "49 labelled images of val"), (50, None)]
)
def test_an_l2_chosen_on_few_images_is_noted(val, noted):
    found = verdict.notes(evaluated(val=val), {})
    assert found == [] if noted is None else noted in found[0]
    assert verdict.notes(evaluated(val=val, labelled=False), {}) == []  # no l2 was chosen


def test_few_steps_are_noted():
    assert verdict.notes(evaluated(), {"steps": 12, "epochs": 4})[0].startswith("12 steps are few: ")
    assert verdict.notes(evaluated(), {"steps": 654, "epochs": 6}) == []


def test_the_lines_for_a_terminal():
    good = evaluated(random=both(UP, UP))
    assert verdict.lines(good) == ["", verdict.verdict(good).headline]
    bad = evaluated(val=12, pixels=both(UP, DOWN))
    lines = verdict.lines(bad, {"steps": 12, "epochs": 4})
    assert lines[1] == verdict.verdict(bad).headline
    assert lines[2:4] == [f"  {text}" for text in verdict.verdict(bad).gains]
    assert lines[4] == "What to try, in this order:"
    assert [line[:5] for line in lines[5:10]] == [f"  {i}. " for i in range(1, 6)]
    assert [line.partition(":")[0] for line in lines[10:]] == ["note", "note"]
