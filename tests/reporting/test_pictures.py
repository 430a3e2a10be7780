import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from barlow.core import images
from barlow.reporting import pictures


def decoded(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_a_matrix_is_coloured_by_its_values():
    matrix = np.array([[-1, 0, 1], [-9, 0.25, 9]])
    pixels = decoded(pictures.matrix(matrix, -1, 1, ("#0000ff", "#ffffff", "#ff0000")))
    blue, white, red = [0, 0, 255], [255, 255, 255], [255, 0, 0]
    assert pixels.tolist() == [[blue, white, red], [blue, [255, 191, 191], red]]


def test_thumbnails_shrink_only_what_is_large():
    gradient = np.linspace(0, 255, 24 * 32 * 3).reshape(24, 32, 3).astype(np.uint8)
    small = decoded(pictures.thumbnail(gradient))
    assert small.shape == (24, 32, 3)
    assert np.abs(small.astype(int) - gradient).max() < 12
    assert decoded(pictures.thumbnail(np.zeros((300, 600, 3), np.uint8))).shape == (48, 96, 3)


def test_a_sheet_has_each_picture_on_its_tile():
    colors = np.random.default_rng(0).integers(0, 256, (7, 3), dtype=np.uint8)
    flat = [np.broadcast_to(color, (20 + i, 30, 3)) for i, color in enumerate(colors)]
    address, columns = pictures.sheet(flat, 16)
    whole = decoded(address)
    assert (whole.shape, columns) == ((48, 48, 3), 3)
    for i, color in enumerate(colors):
        middle = whole[i // 3 * 16 + 8, i % 3 * 16 + 8].astype(int)
        assert np.abs(middle - color).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_cut_short_shows_what_is_there(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    whole = buffer.getvalue()
    part = whole[: len(whole) * 3 // 4]
    with pytest.raises(ValueError, match=r"truncated|broken"):
        images.decode(part)
    seen = images.salvage(part)
    assert seen.shape == noise.shape
    assert (seen[:24] == images.decode(whole)[:24]).all()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(ValueError, match=r"truncated|broken"):
        images.decode(part)


@pytest.mark.parametrize("data", [b"", b"I am a text", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_has_nothing_to_see(data):
    with pytest.raises(ValueError):  # noqa: PT011
        images.salvage(data)


def test_one_flat_colour_is_nothing_to_see():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "gray").save(buffer, "PNG")
    with pytest.raises(ValueError, match="nothing to see"):
        images.salvage(buffer.getvalue())
