import io

import numpy as np
import pytest
from PIL import Image
from tiffs import tiff

from barlow.core import bands, images
from barlow.core.bands import RGB, PixelFormat

RNG = np.random.default_rng(0)
GREY16 = RNG.integers(0, 65536, (9, 12)).astype(np.uint16)


def file(image, form="PNG", **options):
    return images.encode(image, form, **options)


def test_rgb_is_what_images_decodes():
    data = file(Image.fromarray(RNG.integers(0, 256, (9, 12, 3)).astype(np.uint8)), "JPEG")
    assert (bands.decode(data) == images.decode(data)).all()
    assert (bands.unpack(data) == images.decode(data)).all()
    assert bands.form_of(data) == RGB


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_stays(form):
    data = file(Image.fromarray(GREY16), form)
    assert (bands.decode(data, PixelFormat(1, 16))[:, :, 0] == GREY16).all()
    assert (bands.decode(data, PixelFormat(3, 16)) == GREY16[:, :, None]).all()
    eight = bands.decode(data, PixelFormat(1, 8))
    assert eight.dtype == np.uint8
    assert (eight == images.decode(data)[:, :, :1]).all()


def test_8_bits_become_16():
    grey = RNG.integers(0, 256, (9, 12)).astype(np.uint8)
    assert (bands.decode(file(Image.fromarray(grey)), PixelFormat(1, 16))[:, :, 0] == grey * 257.0).all()
    rgb = RNG.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    assert (bands.decode(file(Image.fromarray(rgb)), PixelFormat(3, 16)) == rgb * 257.0).all()


@pytest.mark.parametrize(("high", "factor"), [(1.0, 65535), (200.0, 257), (60000.0, 1)])
def test_floats_are_scaled_by_their_range(high, factor):
    values = np.array([[0, high]], np.float32)
    (low, top) = bands.decode(file(Image.fromarray(values), "TIFF"), PixelFormat(1, 16))[0, :, 0]
    assert (low, top) == (0, round(high * factor))


def test_floats_out_of_range_are_refused():
    with pytest.raises(ValueError, match="float values from -1 to 2: save the image with 8 or 16 bits"):
        bands.decode(file(Image.fromarray(np.array([[-1, 2]], np.float32)), "TIFF"), PixelFormat(1, 16))


def test_another_number_of_channels_is_refused():
    for mode, channels, found in (
        ("RGB", 1, "3 channels"),
        ("RGBA", 3, None),
        ("L", 4, "1 channel"),
        ("P", 4, "3 channels"),
    ):
        data = file(Image.new(mode, (9, 9)))
        if found is None:
            assert bands.decode(data, PixelFormat(channels, 16)).shape == (9, 9, 3)
            continue
        with pytest.raises(ValueError, match=f"^{found} where model.channels={channels} is expected$"):
            bands.decode(data, PixelFormat(channels, 8))


@pytest.mark.parametrize("form", [RGB, PixelFormat(1, 16)])
def test_a_tiff_of_several_channels_says_how_many(form):
    data = tiff(RNG.integers(0, 65536, (9, 12, 5)).astype(np.uint16))
    with pytest.raises(ValueError, match=f"^5 channels where model.channels={form.channels} is expected$"):
        bands.decode(data, form)
    with pytest.raises(images.UnknownFormatError, match=r"^not an image in a known format$"):
        bands.decode(b"no image", form)
    with pytest.raises(images.UnknownFormatError, match=r"^format TIFF; decoded are PNG$"):
        bands.decode(data, form, formats=("PNG",))


def test_a_truncated_tiff_is_named_as_that():
    data = tiff(RNG.integers(0, 65536, (9, 12, 5)).astype(np.uint16), deflate=True)
    with pytest.raises(ValueError, match=r"^damaged or truncated \(decoder error -?\d+\)$"):
        bands.decode(data[:-40], PixelFormat(5, 16))


def test_rgba_is_four_channels():
    rgba = RNG.integers(0, 256, (9, 12, 4)).astype(np.uint8)
    assert (bands.decode(file(Image.fromarray(rgba)), PixelFormat(4, 8)) == rgba).all()


def test_a_16_bit_colour_png_is_refused():
    header = bytearray(file(Image.new("RGB", (9, 9))))
    header[24] = 16
    with pytest.raises(ValueError, match="save it as TIFF"):
        bands.decode(bytes(header), PixelFormat(3, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_pillow_does(orientation):
    pixels = RNG.integers(0, 65536, (9, 12, 5)).astype(np.uint16)
    read = bands.read(tiff(pixels, t274=orientation), PixelFormat(5, 16), None, images.FORMATS)
    assert (read.width, read.height, read.mode, read.format) == (12, 9, "MULTIBAND", "TIFF")
    turn = images.TURNS.get(orientation)
    for i in range(5):
        plane = Image.fromarray((pixels[:, :, i] // 257).astype(np.uint8))
        wanted = np.asarray(plane if turn is None else plane.transpose(turn))
        assert (read.pixels[:, :, i] // 257 == wanted).all()


def test_damaged_files_are_refused_with_a_reason():
    data = tiff(RNG.integers(0, 65536, (9, 12, 5)).astype(np.uint16), deflate=True)
    for damaged in (data[:3], data[:50], data[: len(data) // 2], data[:8] + bytes(60) + data[68:]):
        with pytest.raises(ValueError, match=r"."):
            bands.decode(damaged, PixelFormat(5, 16))


def test_arrays_come_back_from_a_shard():
    for dtype, channels in ((np.uint8, 1), (np.uint16, 7)):
        pixels = RNG.integers(0, 256, (9, 12, channels)).astype(dtype)
        data = bands.pack(pixels)
        assert (np.load(io.BytesIO(data)) == pixels).all()
        back = bands.unpack(np.frombuffer(data, np.uint8))
        assert back.dtype == dtype
        assert (back == pixels).all()
        assert bands.form_of(data) == (channels, 8 * pixels.itemsize)


def test_a_pickle_is_no_array():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="did not write"):
        bands.unpack(buffer.getvalue())


def test_shrunk_keeps_shape_and_range():
    pixels = np.full((40, 20, 5), 65535, np.uint16)
    pixels[::2] = 0
    small = bands.shrunk(pixels, 10)
    assert small.shape == (10, 5, 5)
    assert small.dtype == np.uint16
    assert abs(small.mean() - 65535 / 2) < 700
    assert (bands.shrunk(pixels, 40) == pixels).all()


def test_previews():
    pixels = RNG.integers(0, 65536, (9, 12, 5)).astype(np.uint16)
    assert np.abs(bands.preview(pixels) - pixels[:, :, :3] / 257).max() <= 0.5
    assert (bands.preview(pixels[:, :, :2]) == bands.preview(pixels)[:, :, :1]).all()


def test_resized_takes_the_nearest_pixels():
    pixels = RNG.integers(0, 65536, (4, 6, 2)).astype(np.uint16)
    assert (bands.resized(pixels, 12, 8) == pixels.repeat(2, 0).repeat(2, 1)).all()


def test_noise_is_always_the_same():
    one = bands.noise(2, 8, PixelFormat(5, 16))
    assert one.shape == (2, 8, 8, 5)
    assert one.max() > 255
    assert (one == bands.noise(2, 8, PixelFormat(5, 16))).all()
