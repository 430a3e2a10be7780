import itertools
from dataclasses import replace
from operator import attrgetter

import pytest

from barlow.advice import recipe
from barlow.advice.recipe import Images, Network, Task
from barlow.experiments import grid
from barlow.settings import loading

LABELLED = {"train": 2000, "val": 500, "test": 500}
PHOTOS = Images(2000, 160, 400, False, LABELLED)
TASK = Task(PHOTOS, "cpu", 6.0, {})
NETWORK = Network("resnet10", "stride", 32)


@pytest.fixture
def shipped(request):
    return loading.load(request.config.rootpath / "params.yaml")


def values(task, network=NETWORK, seconds=0.006):
    return {key: value for key, (value, _) in recipe.settings(task, network, seconds).items()}


def test_both_terms_of_the_loss_keep_their_weights_at_any_embedding():
    small, large = (values(replace(TASK, dim=dim))["pretrain.lambd"] for dim in (512, 8192))
    assert small == 0.03
    assert large * 8192 == pytest.approx(small * 512, rel=0.01)


def test_the_settings_for_the_drawn_set_are_those_of_params_yaml(shipped):
    """`barlow recommend` takes what differs from them for the user's own choice."""
    for key, value in recipe.SYNTHETIC.items():
        now = attrgetter(key)(shipped)
        assert (list(now) if isinstance(now, tuple) else now) == value, key
    assert set(values(TASK)) == set(recipe.SYNTHETIC)


@pytest.mark.parametrize("count", [20, 63, 64, 65, 700, 2000, 60_000, 3_000_000])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_epochs_take_the_minutes_and_the_settings_are_valid(shipped, count, device):
    for minutes, seconds, side in itertools.product((0.5, 6, 300), (0.0001, 0.006, 0.2), (20, 50, 500)):
        task = Task(Images(count, side, 2 * side, False, LABELLED), device, minutes, {})
        network = recipe.choose(task, lambda _, seconds=seconds: seconds)
        chosen = values(task, network, seconds)
        grid.apply(shipped, chosen, "the recipe")
        epochs, batch = chosen["pretrain.epochs"], chosen["pretrain.batch_size"]
        assert chosen["pretrain.warmup_epochs"] < epochs
        assert batch <= max(count, recipe.MIN_BATCH)
        epoch = count // batch * batch * seconds / 60
        assert epochs * epoch <= minutes or epochs == 1
        assert (epochs + 1) * epoch > minutes or epochs == recipe.MAX_EPOCHS


def test_each_setting_has_a_reason_that_fits_a_line():
    for key, (value, reason) in recipe.settings(TASK, NETWORK, 0.006).items():
        assert reason
        assert len(f"  # recommended {value}: {reason}") <= 120, key


def test_small_folders_get_many_epochs_and_large_ones_few():
    by_count = [values(replace(TASK, images=replace(PHOTOS, count=n)))["pretrain.epochs"] for n in (500, 5000, 50_000)]
    assert by_count == [125, 12, 1]


@pytest.mark.parametrize(
    ("minutes", "side", "wanted", "measured"),
    [
        (6, 160, 32, [48]),  # 60,000 images of 32 px are 937 steps; 48 px take 2.25 times as long
        (14, 160, 48, [48, 64]),
        (30, 160, 64, [48, 64]),
        (30, 60, 48, [48]),  # images of 60 px have no details for 64
        (30, 28, 32, []),  # the smallest there is
    ],
)
def test_the_size_is_the_largest_that_images_and_minutes_allow(minutes, side, wanted, measured):
    """And no size is measured that is larger than one which takes too long."""
    task, seen = replace(TASK, minutes=minutes, images=replace(PHOTOS, side=side)), []

    def seconds(network):
        seen.append(network.size)
        return 0.006 * (network.size / 32) ** 2

    assert recipe.choose(task, seconds).size == wanted
    assert seen == measured


def test_a_gpu_gets_a_deeper_network_larger_images_and_a_larger_batch():
    task = Task(replace(PHOTOS, count=100_000, side=400), "cuda", 30.0, {})
    assert recipe.choose(task, lambda _: 1e-5) == Network("resnet18", "imagenet", 224)
    assert recipe.choose(replace(task, minutes=120.0), lambda _: 1e-5) == Network("resnet50", "imagenet", 224)
    assert recipe.choose(task, lambda _: 1e-2) == Network("resnet18", "stride", 32)
    assert task.batch == 256


def test_grey_images_get_no_colour_distortions():
    grey, colour = values(replace(TASK, images=replace(PHOTOS, grey=True))), values(TASK)
    distortions = ("views.saturation", "views.hue", "views.grayscale")
    assert [grey[key] for key in distortions] == [0, 0, 0]
    assert all(colour[key] > 0 for key in distortions)


def test_large_images_are_shrunk_when_packed_and_small_ones_are_not():
    assert values(TASK)["shard.max_side"] == 128  # for crops of 32 px
    assert values(replace(TASK, images=replace(PHOTOS, longest=128)))["shard.max_side"] is None


@pytest.mark.parametrize(("count", "wanted"), [(10, 8), (100, 8), (300, 32), (511, 32), (512, 64), (10**6, 64)])
def test_few_images_get_a_smaller_batch(count, wanted):
    assert values(replace(TASK, images=replace(PHOTOS, count=count)))["pretrain.batch_size"] == wanted


def test_what_the_user_has_chosen_decides_the_rest():
    fixed = {"views.size": 96, "model.arch": "resnet34", "pretrain.batch_size": 100, "pretrain.epochs": 50}
    task = replace(TASK, fixed=fixed)
    network = recipe.choose(task, lambda _: 0.1)
    assert network == Network("resnet34", "imagenet", 96)
    chosen = values(task, network)
    assert chosen["shard.max_side"] == 384
    assert chosen["pretrain.warmup_epochs"] == 5  # of 50 epochs
    assert chosen["pretrain.epochs"] == 30  # 360 s at 2000 images of 6 ms: shown beside the user's
    assert task.epoch_steps == 20
    late = replace(TASK, fixed={"pretrain.warmup_epochs": 40})
    assert values(late)["pretrain.epochs"] == 41  # else the rate would never reach its peak


def test_what_to_expect_is_said():
    few = replace(TASK, images=Images(200, 160, 400, False, {"train": 200, "val": 30, "test": 600}))
    said = recipe.remarks(few, recipe.settings(few, NETWORK, 0.006), 0.006)
    epochs = 6 * 60 / (12 * 16 * 0.006)  # 12 steps of 16
    assert said[0] == f"200 images train for {12 * int(epochs):,} steps, in about 6.0 minutes."
    assert "more of them" in said[1]
    assert said[2:] == ["val has 30 labelled images: accuracies are uncertain by 18 points."]

    slow = recipe.remarks(TASK, recipe.settings(TASK, NETWORK, 1.0), 1.0)
    assert slow[1:3] == [
        "That is more than 6 minutes.",
        "Fewer than 800 steps make a weak encoder: give it more time by --minutes.",
    ]
    bare = replace(TASK, images=replace(PHOTOS, labelled={}))
    assert "no labels" in recipe.remarks(bare, recipe.settings(bare, NETWORK, 0.006), 0.006)[-1]
    assert len(recipe.remarks(TASK, recipe.settings(TASK, NETWORK, 0.006), 0.006)) == 1


def test_given_weights_are_trained_on_at_a_tenth_of_the_rates():
    network = recipe.choose(TASK, lambda _: 0.001)
    random, started = (recipe.settings(replace(TASK, started=given), network, 0.001) for given in (False, True))
    for key in ("pretrain.lr_weights", "pretrain.lr_biases"):
        assert started[key][0] == pytest.approx(random[key][0] / 10)
    others = {key: value for key, value in started.items() if not key.startswith("pretrain.lr_")}
    assert others == {key: value for key, value in random.items() if key in others}
    assert "model.weights" in started["pretrain.lr_weights"][1]
