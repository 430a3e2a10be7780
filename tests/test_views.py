import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as F  # noqa: N812

from barlow import shards, views
from barlow.errors import UserError


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Small images on many threads, all of them busy with DALI, take torchvision ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photo(seed, height=48, width=64, low=0, high=255):
    """A smooth picture with detail and muted colours, its values from `low` to `high`."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 128, (6, 8, 3)) + rng.integers(0, 128, (6, 8, 1))
    smooth = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth) * 0.85 + rng.integers(0, 38, (height, width, 3))
    return (low + pixels * (high - low) / 255).round().clip(0, 255).astype(np.uint8)


PHOTOS = [photo(0), photo(1), photo(2, low=0, high=90), photo(3, low=150, high=255)]  # two of them dark and bright


def run(transform, batch, seed=0):
    """Apply a function of DALI nodes to a batch of images (height, width, 3); returns the list of its outputs."""

    @pipeline_def(enable_conditionals=True)
    def pipeline():
        return transform(fn.external_source(lambda: batch, layout="HWC"))

    outputs = pipeline(batch_size=len(batch), num_threads=2, device_id=None, seed=seed, prefetch_queue_depth=1).run()
    return [[np.array(tensor) for tensor in output] for output in outputs]


def chw(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def assert_close(batch, oracle, largest, mean):
    """Compare with torchvision in float, which does not cut off fractions as uint8 does; bounds in levels of 255."""
    for image, photo in zip(batch, PHOTOS, strict=True):
        difference = np.abs(image.astype(float) - 255 * oracle(chw(photo).float() / 255).permute(1, 2, 0).numpy())
        assert difference.max() <= largest
        assert difference.mean() <= mean


# --- each operation against torchvision, in levels of 255


def test_random_resized_crop_is_cubic_and_antialiased_as_in_torchvision():
    bounds = {"random_area": (0.2, 1.0), "random_aspect_ratio": (0.75, 4 / 3)}
    batch = PHOTOS * 8
    (crops,) = run(lambda pixels: views.random_resized_crop(pixels, 24, *bounds.values()), batch, seed=5)
    # The generator of windows gets the same seed and so draws the windows of the crop.
    windows = run(lambda pixels: tuple(fn.random_crop_generator(pixels.shape(), **bounds)), batch, seed=5)
    for photo, crop, top_left, shape in zip(batch, crops, *windows, strict=True):
        window = [int(i) for i in (*top_left, *shape)]
        oracle = F.resized_crop(chw(photo).float(), *window, [24, 24], InterpolationMode.BICUBIC)
        difference = np.abs(crop - oracle.permute(1, 2, 0).numpy().clip(0, 255))
        assert difference[2:-2, 2:-2].max() <= 1
        assert difference.max() <= 6  # at the window's edge DALI's filter reaches out of it, torchvision's is cut off


def test_crop_windows_are_distributed_as_in_torchvision():
    area, ratio = (0.3, 0.8), (0.5, 2.0)
    ramp = np.zeros((240, 240, 3), np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(240), np.arange(240)[:, None]
    (crops,) = run(lambda pixels: views.random_resized_crop(pixels, 24, area, ratio), [ramp] * 500)
    # Between the centres of the second and the second to last of 24 pixels lie 21 / 24 of the window.
    ours = {
        "width": [(float(crop[12, 22, 0]) - crop[12, 1, 0]) * 24 / 21 for crop in crops],
        "height": [(float(crop[22, 12, 1]) - crop[1, 12, 1]) * 24 / 21 for crop in crops],
        "left": [float(crop[12, 1, 0]) for crop in crops],
        "top": [float(crop[1, 12, 1]) for crop in crops],
    }
    torch.manual_seed(0)
    official = v2.RandomResizedCrop(24, area, ratio)
    theirs = [official.make_params([chw(ramp)]) for _ in range(500)]
    for name, values in ours.items():
        inset = {"left": lambda w: w["width"] / 16, "top": lambda w: w["height"] / 16}.get(name, lambda w: 0)
        assert ks_2samp(values, [window[name] + inset(window) for window in theirs]).pvalue > 0.01


@pytest.mark.parametrize("factor", [0.6, 1.4])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_color_jitter(kind, factor):
    factors = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0} | {kind: factor}
    (batch,) = run(lambda pixels: views.color_jitter(pixels, **factors), PHOTOS)
    assert_close(batch, lambda image: getattr(F, f"adjust_{kind}")(image, factor), largest=1, mean=0.3)


def test_color_jitter_takes_them_in_turn():
    (batch,) = run(lambda pixels: views.color_jitter(pixels, 0.8, 1.3, 0.7, 0.0), PHOTOS)
    assert_close(
        batch,
        lambda i: F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(i, 0.8), 1.3), 0.7),
        largest=3,
        mean=1,
    )


@pytest.mark.parametrize("turn", [-0.1, 0.05, 0.1])
def test_hue_turns_as_far_as_in_torchvision_within_its_other_color_space(turn):
    (batch,) = run(lambda pixels: views.color_jitter(pixels, 1.0, 1.0, 1.0, 360 * turn), PHOTOS)
    for image, photo in zip(batch, PHOTOS, strict=True):
        oracle, opposite = (F.adjust_hue(chw(photo), t).permute(1, 2, 0).numpy() for t in (turn, -turn))
        assert np.abs(image.astype(float) - oracle).mean() <= 18
        assert np.abs(image.astype(float) - oracle).mean() < 0.7 * np.abs(image.astype(float) - opposite).mean()


def test_hue_of_zero_changes_nothing():
    (batch,) = run(lambda pixels: views.color_jitter(pixels, 1.0, 1.0, 1.0, 0.0), PHOTOS)
    assert_close(batch, lambda image: image, largest=1, mean=0.1)


def test_grayscale():
    (batch,) = run(views.grayscale, PHOTOS)
    assert_close(batch, lambda image: F.rgb_to_grayscale(image, 3), largest=1, mean=0.3)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur(sigma):
    (batch,) = run(lambda pixels: views.blur(pixels, sigma), PHOTOS)
    window = 2 * int(np.ceil(3 * sigma)) + 1
    assert_close(batch, lambda image: F.gaussian_blur(image, [window, window], [sigma, sigma]), largest=1, mean=0.3)


def test_solarize():
    (batch,) = run(views.solarize, PHOTOS)
    assert_close(batch, lambda image: F.solarize(image, 128 / 255), largest=1e-4, mean=1e-4)


@pytest.mark.parametrize("mirror", [0, 1])
def test_normalize_and_flip(smoke, mirror):
    mean, std = smoke.views.mean, smoke.views.std
    (batch,) = run(lambda pixels: views.normalize(pixels, mirror, mean, std), PHOTOS)
    for image, photo in zip(batch, PHOTOS, strict=True):
        oracle = F.normalize(chw(photo).float() / 255, mean, std)
        np.testing.assert_allclose(image, F.hflip(oracle) if mirror else oracle, atol=2e-6)


# --- the whole transform

PLAIN = {
    "crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "brightness": 0.0, "contrast": 0.0,
    "saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0), "blur_sigma": (1.0, 1.0),
    "solarize": (0.0, 0.0), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "size": 8,
}  # fmt: skip


@pytest.fixture
def plain(smoke):
    """`plain(flip=1.0)` returns view settings that change nothing but what is given."""
    return lambda **values: dataclasses.replace(smoke.views, **PLAIN | values)


def test_plain_settings_give_the_image_itself(plain):
    image = photo(0, 8, 8)
    for (view,) in run(lambda pixels: tuple(views.augment(pixels, plain(), v) for v in (0, 1)), [image]):
        np.testing.assert_allclose(view, image.transpose(2, 0, 1) / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"flip": 0.5}, (0.5, 0.5)),
        ({"jitter": 0.8, "brightness": 0.4}, (0.8, 0.8)),
        ({"jitter": 0.8, "contrast": 0.4}, (0.8, 0.8)),
        ({"jitter": 0.8, "saturation": 0.4}, (0.8, 0.8)),
        ({"jitter": 0.8, "hue": 0.1}, (0.8, 0.8)),
        ({"grayscale": 0.2}, (0.2, 0.2)),
        ({"blur": (1.0, 0.1)}, (1.0, 0.1)),
        ({"solarize": (0.0, 0.2)}, (0.0, 0.2)),
    ],
)
def test_each_distortion_is_as_frequent_in_each_view_as_set(plain, settings, expected):
    n, image = 1000, photo(0, 8, 8)
    batches = run(lambda pixels: tuple(views.augment(pixels, plain(**settings), v) for v in (0, 1)), [image] * n)
    for batch, probability in zip(batches, expected, strict=True):
        unchanged = np.abs(np.array(batch) - image.transpose(2, 0, 1) / 255).max(axis=(1, 2, 3)) < 1.5 / 255
        margin = 4 * np.sqrt(probability * (1 - probability) / n)
        # A drawn strength near none at all shows as no change: 3 % at most.
        assert probability - margin - 0.03 <= 1 - unchanged.mean() <= probability + margin


@pytest.mark.parametrize(
    ("kind", "strength", "measure"),
    [
        ("brightness", 0.4, lambda image: image.mean()),
        ("contrast", 0.4, lambda image: image.std()),
        ("saturation", 0.4, lambda image: image[0].mean() - image[1].mean()),
        ("hue", 0.1, lambda image: image[1].mean() - image[2].mean()),
    ],
)
def test_jitter_draws_evenly_from_the_whole_range(plain, kind, strength, measure):
    image = np.full((8, 8, 3), [170, 110, 110], np.uint8)
    image[:, 4:] -= 30
    settings = plain(jitter=1.0, **{kind: strength})
    (batch,) = run(lambda pixels: views.augment(pixels, settings, 0), [image] * 1000)
    drawn = np.array([measure(image) for image in batch]) * 255

    def at(strength):
        factors = [1.0 + strength * (kind == name) for name in ("brightness", "contrast", "saturation")]
        turn = 360 * strength if kind == "hue" else 0.0
        ((jittered,),) = run(lambda pixels: views.color_jitter(pixels, *factors, turn), [image])
        return measure(jittered.astype(float).transpose(2, 0, 1))

    assert sorted([drawn.min(), drawn.max()]) == pytest.approx(sorted([at(-strength), at(strength)]), abs=1.5)
    assert np.mean(drawn < at(0)) == pytest.approx(0.5, abs=0.08)


def test_views_are_distributed_as_those_of_the_official_transform(smoke):
    """Statistics of many views against torchvision's transforms, put together as in the paper's code."""
    settings = {"size": 32, "crop_area": (0.3, 1.0), "blur": (1.0, 0.1), "blur_sigma": (0.1, 2.0)}
    rare = {"grayscale": 0.0, "solarize": (0.0, 0.0)}  # how often is tested above; here it would only add noise
    p = dataclasses.replace(smoke.views, **settings, **rare)
    batch = [photo(seed) for seed in range(250)] * 2
    torch.manual_seed(0)
    for view, distorted in enumerate(run(lambda x: tuple(views.augment(x, p, v) for v in (0, 1)), batch)):
        official = v2.Compose([
            v2.RandomResizedCrop(p.size, p.crop_area, p.crop_ratio, InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(p.flip),
            v2.RandomApply([v2.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue)], p.jitter),
            v2.RandomApply([v2.GaussianBlur(13, p.blur_sigma)], p.blur[view]),
        ])  # fmt: skip
        ours = np.array(distorted) * np.array(p.std)[:, None, None] + np.array(p.mean)[:, None, None]
        theirs = np.array([np.asarray(official(Image.fromarray(image))) for image in batch]).transpose(0, 3, 1, 2) / 255
        for statistic in (
            lambda x: x.mean(),
            lambda x: x.mean(axis=(2, 3)).std(),  # brightness of the images
            lambda x: x.std(axis=(2, 3)).mean(),  # contrast
            lambda x: (x.max(axis=1) - x.min(axis=1)).mean(),  # saturation
            lambda x: np.abs(np.diff(x)).mean(),  # sharpness
        ):
            assert statistic(ours) == pytest.approx(statistic(theirs), rel=0.08)


# --- the reader

COUNT = 53  # no multiple of anything below


def numbered(i):
    """An 8 px image whose colour tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (i, 255 - i, 0)).save(buffer, "PNG")
    return shards.Sample(f"{i:024x}", buffer.getvalue(), "png", -1)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """53 numbered images in five tars."""
    folder = tmp_path_factory.mktemp("shards")
    for n in range(5):
        shards.write(folder / f"pretrain-{n:06d}.tar", map(numbered, range(11 * n, min(11 * n + 11, COUNT))))
    return shards.tars("pretrain", folder)


@pytest.fixture(params=[1, 5])
def one_or_more_tars(request, tars, tmp_path):
    """The same images in one tar, or in five."""
    if request.param > 1:
        return tars
    shards.write(tmp_path / "pretrain-000000.tar", map(numbered, range(COUNT)))
    return shards.tars("pretrain", tmp_path)


def epoch(twin_views):
    """The numbers of the images of an epoch, batch by batch."""
    batches = []
    for view_a, view_b in twin_views:
        assert torch.equal(view_a, view_b)  # the same images in both
        batches.append((view_a[:, 0, 4, 4] * 255).round().int().tolist())
    return batches


def flat(batches):
    return [number for batch in batches for number in batch]


@pytest.fixture
def few_held(monkeypatch):
    """Let the reader draw from 8 images or so, as it does where a set is larger than memory."""
    monkeypatch.setattr(views, "SHUFFLE_BYTES", 15_000)


def test_an_epoch_has_every_image_at_most_once_and_each_has_a_new_order(one_or_more_tars, plain, few_held):
    twin_views = views.TwinViews(one_or_more_tars, plain(), 5, seed=0)
    epochs = [flat(epoch(twin_views)) for _ in range(3)]
    for numbers in epochs:
        assert len(numbers) == len(set(numbers)) == 50 == 5 * len(twin_views)
    assert len({frozenset(numbers) for numbers in epochs}) > 1  # the images left out differ
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_small_set_is_shuffled_as_a_whole(tars, plain):
    numbers = flat(epoch(views.TwinViews(tars, plain(), COUNT, seed=0)))
    assert sorted(numbers) == list(range(COUNT))
    assert abs(np.corrcoef(numbers, range(COUNT))[0, 1]) < 0.3


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_epoch_out_between_them(one_or_more_tars, plain, few_held, world_size):
    ranks = [views.TwinViews(one_or_more_tars, plain(), 3, 0, rank, world_size) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {COUNT // world_size // 3}
    seen = [set() for _ in ranks]
    for _ in range(3):
        numbers = [flat(epoch(rank)) for rank in ranks]
        assert len(flat(numbers)) == len(set(flat(numbers))) == 3 * world_size * len(ranks[0])
        for rank, ours in zip(seen, numbers, strict=True):
            rank |= set(ours)
    assert all(len(rank) > 1.2 * COUNT / world_size for rank in seen)  # not the same part in each epoch


def test_ranks_distort_differently(tmp_path, plain):
    shards.write(tmp_path / "pretrain-000000.tar", (numbered(100)._replace(key=f"{i:024x}") for i in range(40)))
    settings = plain(jitter=1.0, brightness=0.4)
    brightness = set()
    for rank in (0, 1):
        ((view_a, view_b),) = views.TwinViews(shards.tars("pretrain", tmp_path), settings, 20, 0, rank, 2)
        brightness |= {round(float(image.mean()), 4) for view in (view_a, view_b) for image in view}
    assert len(brightness) > 60  # of 80


def test_a_whole_number_of_batches_leaves_nothing_out(tars, plain):
    twin_views = views.TwinViews(tars[:2], plain(), 11, seed=0)
    for _ in range(3):
        assert sorted(flat(epoch(twin_views))) == list(range(22))


def test_batches_are_normalised_float32_channels_first(tars, smoke):
    view_a, view_b = next(iter(views.TwinViews(tars, smoke.views, 7, seed=0)))
    assert view_a.shape == view_b.shape == (7, 3, smoke.views.size, smoke.views.size)
    assert view_a.dtype == view_b.dtype == torch.float32
    assert view_a.device.type == "cpu"
    assert view_a.is_contiguous()
    assert not torch.equal(view_a, view_b)


def batches(twin_views, n):
    """The next `n` batches, over as many epochs as that takes."""
    endless = itertools.chain.from_iterable(itertools.repeat(twin_views))
    return [torch.stack(pair) for pair in itertools.islice(endless, n)]


def test_the_seed_fixes_everything_and_the_number_of_threads_nothing(tars, smoke):
    def first(**options):
        return batches(views.TwinViews(tars, smoke.views, **{"batch_size": 5, "seed": 1} | options), 12)

    reference = first(threads=1)
    assert all(map(torch.equal, reference, first(threads=3)))
    assert not any(map(torch.equal, reference, first(seed=2)))


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_a_restored_run_goes_on_as_the_undisturbed_one(one_or_more_tars, smoke, few_held, rank, world_size):
    arguments = (one_or_more_tars, smoke.views, 6 // world_size, 0, rank, world_size)
    undisturbed = views.TwinViews(*arguments)
    assert len(undisturbed) == 8
    expected, states = [], [undisturbed.state_dict()]
    for _ in range(3):
        for pair in undisturbed:
            expected.append(torch.stack(pair))
            states.append(undisturbed.state_dict())
    restored = views.TwinViews(*arguments)
    for done in (3, 0, 7, 8, 9, 16, 19):  # of the three epochs of 8; what was done before is forgotten
        restored.load_state_dict(states[done])
        assert all(map(torch.equal, batches(restored, 24 - done), expected[done:]))
        restored.load_state_dict(states[done])
        assert sum(1 for _ in restored) == 8 - done % 8  # the rest of its epoch


def test_a_state_is_small_and_holds_no_objects(tars, smoke):
    twin_views = views.TwinViews(tars, smoke.views, 5, seed=0)
    batches(twin_views, 3)
    state = twin_views.state_dict()
    pipeline = state.pop("pipeline")
    assert isinstance(pipeline, bytes)
    assert len(pipeline) < 20_000
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("batch_size", {"batch_size": 4}),
        ("seed", {"seed": 1}),
        ("rank", {"rank": 0}),
        ("world_size", {"world_size": 3}),
        ("shards", {"part": slice(4)}),
        ("views", {"flip": 0.25}),
    ],
)
def test_a_state_of_another_run_is_refused(tars, smoke, name, other):
    def build(part=slice(None), flip=0.5, **options):
        arguments = {"batch_size": 5, "seed": 0, "rank": 1, "world_size": 2} | options
        return views.TwinViews(tars[part], dataclasses.replace(smoke.views, flip=flip), **arguments)

    build().load_state_dict(build().state_dict())
    with pytest.raises(ValueError, match=f"the saved state has another {name}: "):
        build().load_state_dict(build(**other).state_dict())


def test_fewer_images_than_a_batch(tars, smoke):
    with pytest.raises(UserError, match=r"pretrain.batch_size=54 is more than the 53 images"):
        views.TwinViews(tars, smoke.views, 27, 0, rank=0, world_size=2)
    with pytest.raises(UserError, match=r"pretrain.batch_size=8 is more than the 0 images"):
        views.TwinViews([], smoke.views, 8, 0)


def test_images_that_do_not_decode_are_named(tmp_path, smoke):
    samples = [numbered(i) for i in range(30)]
    for i in (3, 20):
        samples[i] = samples[i]._replace(data=samples[i].data[:60])
    shards.write(tmp_path / "pretrain-000000.tar", samples[:2])
    shards.write(tmp_path / "pretrain-000001.tar", samples[2:])
    twin_views = views.TwinViews(shards.tars("pretrain", tmp_path), smoke.views, 30, 0)
    bad = rf"pretrain-000001\.tar: {samples[3].key}\.png, {samples[20].key}\.png cannot be decoded"
    with pytest.raises(UserError, match=bad):
        next(iter(twin_views))


def test_pairs_are_the_first_images_as_the_network_sees_them(tars, plain):
    settings = plain(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), solarize=(0.0, 1.0))
    view_a, view_b = views.pairs(tars, settings, 13, seed=0)
    assert view_a.shape == view_b.shape == (13, 8, 8, 3)
    assert view_a.dtype == view_b.dtype == np.uint8
    assert view_a[:, 0, 0].tolist() == [[i, 255 - i, 0] for i in range(13)]
    assert view_b[:, 0, 0].tolist() == [[i, i, 0] for i in range(13)]
    assert len(views.pairs(tars, settings, 99, seed=0)[0]) == COUNT


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the GPU path is not tested here")
def test_gpu_gives_what_cpu_gives(tars, plain):
    settings = plain(size=16, jitter=1.0, brightness=0.4, contrast=0.4, solarize=(0.0, 1.0), blur=(1.0, 0.0))
    cpu, gpu = (batches(views.TwinViews(tars, settings, 7, 0, device_id=device), 8) for device in (None, 0))
    assert all(batch.device.type == "cuda" for batch in gpu)
    assert all((a - b.cpu()).abs().max() < 3 / 255 for a, b in zip(cpu, gpu, strict=True))
