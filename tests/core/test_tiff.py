import itertools

import numpy as np
import pytest
from tiffs import tiff as written

from barlow.core import tiff
from barlow.core.images import TooManyPixelsError

RNG = np.random.default_rng(0)
CASES = [
    (dtype, order, separate, deflate, differences)
    for dtype, order, separate, deflate, differences in itertools.product(
        (np.uint8, np.uint16), "<>", (False, True), (False, True), (False, True)
    )
    if deflate or not differences
]


def pixels(channels, dtype=np.uint16):
    return RNG.integers(0, np.iinfo(dtype).max + 1, (20, 13, channels)).astype(dtype)


@pytest.mark.parametrize(("dtype", "order", "separate", "deflate", "differences"), CASES)
def test_it_reads_what_was_written(dtype, order, separate, deflate, differences):
    for channels in (2, 5, 16):
        image = pixels(channels, dtype)
        read = tiff.read(written(image, order, separate, deflate, differences), channels, None)
        assert read.pixels.dtype == dtype
        assert (read.pixels == image).all()
        assert read.orientation == 1


def test_pages_are_channels():
    image = pixels(5)
    assert (tiff.read(written(image, paged=True), 5, None).pixels == image).all()
    with pytest.raises(ValueError, match=r"^5 channels where model.channels=4 is expected$"):
        tiff.read(written(image, paged=True), 4, None)
    with pytest.raises(ValueError, match=r"^1 channel where model.channels=2 is expected$"):
        tiff.read(written(image[:, :, :1]), 2, None)


def test_alpha_beside_three_channels_is_dropped():
    image = pixels(4)
    assert (tiff.read(written(image, t262=2), 3, None).pixels == image[:, :, :3]).all()


def test_pillow_reads_the_rest_of_three_channels():
    assert tiff.read(written(pixels(3, np.uint8)), 3, None) is None
    assert tiff.read(written(pixels(1)), 3, None) is None


def test_large_images_are_not_decoded():
    with pytest.raises(TooManyPixelsError, match="13 x 20 pixels, more than the 259 allowed"):
        tiff.read(written(pixels(5)), 5, 259)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"t259": 7}, "compression 7; use deflate or LZW"),
        ({"t339": 3}, r"sample format \[3\]; save uint8 or uint16"),
        ({"t258": 32}, r"values of \[32\] bits"),
    ],
)
def test_other_kinds_are_refused(tags, reason):
    with pytest.raises(ValueError, match=reason):
        tiff.read(written(pixels(5), **tags), 5, None)


def test_the_orientation_is_told():
    assert tiff.read(written(pixels(5), t274=6), 5, None).orientation == 6
    assert tiff.read(written(pixels(5), t274=77), 5, None).orientation == 1


def test_pillow_does_not_say_how_many_channels_a_file_has():
    for channels in (1, 3):
        with pytest.raises(ValueError, match=rf"^5 channels where model.channels={channels} is expected$"):
            tiff.check(written(pixels(5)), channels)
    for data in (b"", b"no TIFF", written(pixels(5))[:40]):
        tiff.check(data, 3)
