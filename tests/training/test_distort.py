import dataclasses

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as F  # noqa: N812

from barlow.training import distort

pytestmark = pytest.mark.usefixtures("one_thread")


def photo(seed, height=48, width=64, low=0, high=255):
    """A smooth picture with detail and muted colours, its values from `low` to `high`."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 128, (6, 8, 3)) + rng.integers(0, 128, (6, 8, 1))
    smooth = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth) * 0.85 + rng.integers(0, 38, (height, width, 3))
    return (low + pixels * (high - low) / 255).round().clip(0, 255).astype(np.uint8)


PHOTOS = [photo(0), photo(1), photo(2, low=0, high=90), photo(3, low=150, high=255)]  # two of them dark and bright


def run(transform, batch, *drawn):
    """Apply a function of DALI nodes to images (height, width, 3) and arrays (n, ...); returns its outputs as lists."""

    @pipeline_def(enable_conditionals=True)
    def pipeline():
        layouts = ["HWC", *[""] * len(drawn)]
        return transform(*fn.external_source(lambda: (batch, *drawn), num_outputs=len(layouts), layout=layouts))

    outputs = pipeline(batch_size=len(batch), num_threads=2, device_id=None, prefetch_queue_depth=1).run()
    return [[np.array(tensor) for tensor in output] for output in outputs]


def views_of(batch, settings, view, seed=0):
    """Draw and apply the distortions of view A (0) or B (1); returns floats (n, 3, size, size)."""
    sides = np.array([image.shape[:2] for image in batch])
    drawn = distort.draw(settings, view, sides, np.random.default_rng(seed))
    (out,) = run(lambda pixels, *nodes: distort.augment(pixels, distort.Distortion(*nodes), settings), batch, *drawn)
    return np.array(out)


def chw(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def assert_close(batch, oracle, largest, mean):
    """Compare with torchvision in float, which does not cut off fractions as uint8 does; bounds in levels of 255."""
    for image, photo in zip(batch, PHOTOS, strict=True):
        difference = np.abs(image.astype(float) - 255 * oracle(chw(photo).float() / 255).permute(1, 2, 0).numpy())
        assert difference.max() <= largest
        assert difference.mean() <= mean


# --- each operation against torchvision, in levels of 255


def official_windows(sides, area, ratio, seed=0):
    """What torchvision's RandomResizedCrop draws for an image: starts and sizes, y and x, (n, 2) each."""
    torch.manual_seed(seed)
    official = v2.RandomResizedCrop(24, area, ratio)
    drawn = [official.make_params([torch.empty(3, *image)]) for image in sides]
    return np.array([[(w["top"], w["left"]), (w["height"], w["width"])] for w in drawn]).transpose(1, 0, 2)


def windows(sides, area, ratio, seed=0):
    """What `crop_windows` draws: starts and sizes."""
    start, end = distort.crop_windows(np.array(sides, np.int32), area, ratio, np.random.default_rng(seed))
    return start.astype(float), (end - start).astype(float)


def test_resized_crop_is_cubic_and_antialiased_as_in_torchvision():
    batch = PHOTOS * 8
    start, size = windows([photo.shape[:2] for photo in batch], (0.2, 1.0), (0.75, 4 / 3), seed=5)
    (crops,) = run(lambda *nodes: distort.resized_crop(*nodes, 24), batch, *np.float32([start, start + size]))
    for photo, crop, *window in zip(batch, crops, start, size, strict=True):
        window = np.concatenate(window).astype(int).tolist()
        oracle = F.resized_crop(chw(photo).float(), *window, [24, 24], InterpolationMode.BICUBIC)
        difference = np.abs(crop - oracle.permute(1, 2, 0).numpy().clip(0, 255))
        assert difference[2:-2, 2:-2].max() <= 1
        assert difference.max() <= 6  # at the window's edge DALI's filter reaches out of it, torchvision's is cut off


def test_a_window_beyond_the_image_shows_its_border():
    """As where DALI turns an image and Pillow does not; without care DALI ends the process."""
    image = np.repeat(np.arange(60, dtype=np.uint8)[:, None], 40, 1)[:, :, None].repeat(3, 2)  # 60 px high
    start, end = np.float32([[0, 45], [70, 0], [55, 10]]), np.float32([[40, 60], [90, 30], [500, 20]])
    (crops,) = run(lambda *nodes: distort.resized_crop(*nodes, 24), [image] * 3, start, end)
    assert (crops[0][0] <= 1).all()
    assert (crops[0][-1] >= 38).all()
    assert (crops[1] == 59).all()
    assert (crops[2][12:] == 59).all()


@pytest.mark.parametrize(
    ("sides", "area", "ratio"),
    [
        ((240, 240), (0.3, 0.8), (0.5, 2.0)),
        ((240, 240), (0.08, 1.0), (0.75, 4 / 3)),
        ((32, 32), (0.3, 1.0), (0.75, 4 / 3)),
        ((375, 500), (0.08, 1.0), (0.75, 4 / 3)),
        ((30, 400), (0.05, 0.3), (0.75, 4 / 3)),  # one in ten fits: a third of the images has none
        ((400, 30), (0.05, 0.3), (0.75, 4 / 3)),
        ((30, 400), (0.01, 0.2), (0.5, 3.0)),
        ((300, 300), (0.9, 1.0), (0.4, 1.1)),
    ],
)
def test_crop_windows_are_distributed_as_in_torchvision(sides, area, ratio):
    ours, theirs = (draw([sides] * 2000, area, ratio) for draw in (windows, official_windows))
    for name, statistic in {
        "height": lambda start, size: size[:, 0],
        "width": lambda start, size: size[:, 1],
        "top": lambda start, size: start[:, 0],
        "left": lambda start, size: start[:, 1],
        "bottom": lambda start, size: sides[0] - (start + size)[:, 0],
        "right": lambda start, size: sides[1] - (start + size)[:, 1],
        "area": lambda start, size: size.prod(1),
        "ratio": lambda start, size: size[:, 1] / size[:, 0],
    }.items():
        assert ks_2samp(statistic(*ours), statistic(*theirs)).pvalue > 0.01, name


def test_windows_of_a_batch_are_drawn_each_for_its_image():
    sides = [(240, 240), (30, 400), (400, 30), (64, 48)] * 500
    start, size = windows(sides, (0.05, 0.5), (0.75, 4 / 3))
    for i in range(4):
        _, theirs = official_windows(sides[i::4], (0.05, 0.5), (0.75, 4 / 3))
        assert ks_2samp(size[i::4].prod(1), theirs.prod(1)).pvalue > 0.01
    place = start / (np.array(sides) - size + 1)
    for one, other in [(size[::4, 0], size[3::4, 0]), (place[::4, 0], place[3::4, 0]), (place[::4, 0], place[::4, 1])]:
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15  # drawn apart


@pytest.mark.parametrize("sides", [(30, 400), (400, 30), (31, 400), (7, 100), (101, 10), (10, 101), (1, 50), (50, 3)])
def test_where_no_window_fits_it_is_the_largest_in_the_middle(sides):
    bounds = (0.7, 1.0), (0.75, 4 / 3)
    start, size = windows([sides] * 20, *bounds)
    theirs = official_windows([sides], *bounds)
    assert np.array_equal(start, np.repeat(theirs[0], 20, 0))
    assert np.array_equal(size, np.repeat(theirs[1], 20, 0))


@pytest.mark.parametrize(
    ("area", "ratio"),
    [
        ((0.3, 1.0), (0.75, 4 / 3)),
        ((1e-9, 1.0), (0.75, 4 / 3)),
        ((1e-9, 1e-8), (0.01, 100.0)),
        ((1.0, 1.0), (1.0, 1.0)),
        ((1.0, 1.0), (0.001, 0.002)),
        ((1.0, 1.0), (500.0, 1000.0)),
    ],
)
def test_windows_are_whole_pixels_inside_the_image(area, ratio):
    some = [1, 2, 3, 5, 31, 400, 9999, 65_500]
    sides = np.array([(height, width) for height in some for width in some] * 20, np.int32)
    start, end = distort.crop_windows(sides, area, ratio, np.random.default_rng(0))
    assert start.dtype == end.dtype == np.float32
    for corner in (start, end):
        assert np.array_equal(corner, np.rint(corner))
    assert start.min() >= 0
    assert (end - start).min() >= 1
    assert (end <= sides).all()


def test_every_place_is_as_likely():
    start, size = windows([(6, 7)] * 60_000, (0.45, 0.5), (1.0, 1.0))
    assert set(map(tuple, size.tolist())) == {(4, 4), (5, 5)}
    for side, places in {4: 3 * 4, 5: 2 * 3}.items():
        _, counts = np.unique(start[size[:, 0] == side], axis=0, return_counts=True)
        assert len(counts) == places
        assert chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("factor", [0.6, 1.4])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_color_jitter(kind, factor):
    factors = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0} | {kind: factor}
    (batch,) = run(lambda pixels: distort.color_jitter(pixels, **factors), PHOTOS)
    assert_close(batch, lambda image: getattr(F, f"adjust_{kind}")(image, factor), largest=1, mean=0.3)


def test_color_jitter_takes_them_in_turn():
    (batch,) = run(lambda pixels: distort.color_jitter(pixels, 0.8, 1.3, 0.7, 0.0), PHOTOS)
    assert_close(
        batch,
        lambda i: F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(i, 0.8), 1.3), 0.7),
        largest=3,
        mean=1,
    )


@pytest.mark.parametrize("turn", [-0.1, 0.05, 0.1])
def test_hue_turns_as_far_as_in_torchvision_within_its_other_color_space(turn):
    (batch,) = run(lambda pixels: distort.color_jitter(pixels, 1.0, 1.0, 1.0, 360 * turn), PHOTOS)
    for image, photo in zip(batch, PHOTOS, strict=True):
        oracle, opposite = (F.adjust_hue(chw(photo), t).permute(1, 2, 0).numpy() for t in (turn, -turn))
        assert np.abs(image.astype(float) - oracle).mean() <= 18
        assert np.abs(image.astype(float) - oracle).mean() < 0.7 * np.abs(image.astype(float) - opposite).mean()


def test_hue_of_zero_changes_nothing():
    (batch,) = run(lambda pixels: distort.color_jitter(pixels, 1.0, 1.0, 1.0, 0.0), PHOTOS)
    assert_close(batch, lambda image: image, largest=1, mean=0.1)


def test_grayscale():
    (batch,) = run(distort.grayscale, PHOTOS)
    assert_close(batch, lambda image: F.rgb_to_grayscale(image, 3), largest=1, mean=0.3)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur(sigma):
    (batch,) = run(lambda pixels: distort.blur(pixels, sigma), PHOTOS)
    window = 2 * int(np.ceil(3 * sigma)) + 1
    assert_close(batch, lambda image: F.gaussian_blur(image, [window, window], [sigma, sigma]), largest=1, mean=0.3)


def test_solarize():
    (batch,) = run(distort.solarize, PHOTOS)
    assert_close(batch, lambda image: F.solarize(image, 128 / 255), largest=1e-4, mean=1e-4)


@pytest.mark.parametrize("mirror", [0, 1])
def test_normalize_and_flip(smoke, mirror):
    mean, std = smoke.views.mean, smoke.views.std
    (batch,) = run(lambda pixels: distort.normalize(pixels, mirror, mean, std), PHOTOS)
    for image, photo in zip(batch, PHOTOS, strict=True):
        oracle = F.normalize(chw(photo).float() / 255, mean, std)
        np.testing.assert_allclose(image, F.hflip(oracle) if mirror else oracle, atol=2e-6)


# --- the whole transform


def test_plain_settings_give_the_image_itself(plain):
    image = photo(0, 8, 8)
    for view in (0, 1):
        np.testing.assert_allclose(views_of([image], plain(), view)[0], image.transpose(2, 0, 1) / 255, atol=1e-6)


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
    for view, probability in enumerate(expected):
        batch = views_of([image] * n, plain(**settings), view, seed=view)
        unchanged = np.abs(batch - image.transpose(2, 0, 1) / 255).max(axis=(1, 2, 3)) < 1.5 / 255
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
    batch = views_of([image] * 1000, settings, 0)
    drawn = np.array([measure(image) for image in batch]) * 255

    def at(strength):
        factors = [1.0 + strength * (kind == name) for name in ("brightness", "contrast", "saturation")]
        turn = 360 * strength if kind == "hue" else 0.0
        ((jittered,),) = run(lambda pixels: distort.color_jitter(pixels, *factors, turn), [image])
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
    for view in (0, 1):
        official = v2.Compose([
            v2.RandomResizedCrop(p.size, p.crop_area, p.crop_ratio, InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(p.flip),
            v2.RandomApply([v2.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue)], p.jitter),
            v2.RandomApply([v2.GaussianBlur(13, p.blur_sigma)], p.blur[view]),
        ])  # fmt: skip
        ours = views_of(batch, p, view, seed=view) * np.array(p.std)[:, None, None] + np.array(p.mean)[:, None, None]
        theirs = np.array([np.asarray(official(Image.fromarray(image))) for image in batch]).transpose(0, 3, 1, 2) / 255
        for statistic in (
            lambda x: x.mean(),
            lambda x: x.mean(axis=(2, 3)).std(),  # brightness of the images
            lambda x: x.std(axis=(2, 3)).mean(),  # contrast
            lambda x: (x.max(axis=1) - x.min(axis=1)).mean(),  # saturation
            lambda x: np.abs(np.diff(x)).mean(),  # sharpness
        ):
            assert statistic(ours) == pytest.approx(statistic(theirs), rel=0.08)
