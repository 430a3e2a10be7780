import pytest

from barlow.experiments import grid, tuning
from barlow.experiments.tuning import Factor, Outcome
from barlow.settings import loading


@pytest.fixture
def params(request):
    return loading.load(request.config.rootpath / "params.yaml")


def test_one_setting_at_a_time_around_the_present_one(params):
    rate, crop, lambd = tuning.factors(params)
    assert (rate.name, crop.name, lambd.name) == ("learning rate", "crop area", "lambda")
    assert rate.levels == {
        "0.2": {"pretrain.lr_weights": 0.2, "pretrain.lr_biases": 0.0048},
        "1.8": {"pretrain.lr_weights": 1.8, "pretrain.lr_biases": 0.0432},
    }
    assert crop.levels == {
        "0.1 to 1": {"views.crop_area": [0.1, 1.0]},
        "0.6 to 1": {"views.crop_area": [0.6, 1.0]},
    }
    assert lambd.levels == {"0.000667": {"pretrain.lambd": 0.000667}, "0.006": {"pretrain.lambd": 0.006}}
    for factor in (rate, crop, lambd):
        for label, values in factor.levels.items():
            grid.apply(params, values, label)
    assert tuning.present(params) == {"learning rate": "0.6", "crop area": "0.3 to 1", "lambda": "0.002"}


@pytest.mark.parametrize(("area", "labels"), [((0.08, 1.0), ["0.16 to 1"]), ((0.8, 0.9), ["0.267 to 0.9"])])
def test_crops_stay_within_bounds(params, change, area, labels):
    """A level that would be the present value is none."""
    _, crop, _ = tuning.factors(change(params, "views", crop_area=area))
    assert list(crop.levels) == labels


def test_what_is_switched_off_is_not_tuned(params, change):
    assert [f.name for f in tuning.factors(change(params, "pretrain", lambd=0.0))] == ["learning rate", "crop area"]


def of(*levels):
    return [Factor(str(i), {str(j): {} for j in range(n)}) for i, n in enumerate(levels)]


@pytest.mark.parametrize(
    ("minutes", "wanted"),
    [
        (70, (3, 10)),  # 7 runs of 10 epochs, a minute each
        (35, (3, 5)),
        (20, (2, 4)),  # 7 runs would get 2 epochs, 80 steps
        (11, (1, 3)),
        (5, (1, 1)),
        (1, (1, 1)),  # 3 epochs do not fit, and fewer than that tell nothing
        (1000, (3, 30)),  # no run is longer than the real one
    ],
)
def test_what_fits_the_minutes(minutes, wanted):
    assert tuning.plan(of(2, 2, 2), 60.0, 40, minutes, 30) == wanted


def ranks(**by_label):
    return {label: None if rank is None else Outcome(rank, None, 0) for label, rank in by_label.items()}


def accuracies(images, **by_label):
    return {label: Outcome(100.0 - knn, knn, images) for label, knn in by_label.items()}


@pytest.mark.parametrize(
    ("outcomes", "by_labels", "wanted"),
    [
        (accuracies(100, now=50.0, low=56.0, high=40.0), True, "low"),  # the standard error is 5
        (accuracies(100, now=50.0, low=54.0, high=40.0), True, "now"),
        (accuracies(2500, now=50.0, low=54.0, high=40.0), True, "low"),  # 1
        (accuracies(100, now=50.0, low=60.0, high=61.0), True, "high"),
        (accuracies(100, now=50.0, low=56.0, high=40.0), False, "high"),  # ranks are 50, 44, 60
        (ranks(now=100.0, low=104.0, high=90.0), False, "now"),
        (ranks(now=100.0, low=106.0, high=90.0), False, "low"),
        (ranks(now=None, low=10.0, high=20.0), False, "high"),
        (ranks(now=30.0, low=None, high=20.0), False, "now"),
        (ranks(now=None, low=None, high=None), False, "now"),
    ],
)
def test_the_better_run(outcomes, by_labels, wanted):
    assert tuning.better(outcomes, "now", by_labels) == wanted
