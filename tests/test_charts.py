import base64
import io

import numpy as np
import pytest
from PIL import Image

from barlow import charts


def decoded(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 1, 4) == [0, 0.5, 1]
    assert charts.ticks(0, 0.35, 4) == [0, 0.1, 0.2, 0.3]
    assert charts.ticks(1, 14, 8) == [2, 4, 6, 8, 10, 12, 14]
    assert charts.ticks(3, 3, 4) == [3]


@pytest.mark.parametrize("high", [0.0007, 0.9, 1, 42, 1000, 123456])
def test_ticks_are_neither_few_nor_many(high):
    assert 2 <= len(charts.ticks(0, high, 4)) <= 5


def test_decades():
    assert charts.decades(0.3, 30) == [0.5, 1, 2, 5, 10, 20]
    assert charts.decades(0.002, 300) == [0.01, 0.1, 1, 10, 100]


def test_a_logarithmic_curve():
    left, top, right, bottom = charts.PLOT
    laid = charts.chart([100, 10, 1], log=True)
    assert laid["points"] == [(left, top), ((left + right) / 2, (top + bottom) / 2), (right, bottom)]
    assert ((top + bottom) / 2, "10") in laid["y_ticks"]
    assert [text for _, text in laid["x_ticks"]] == ["1", "2", "3"]


def test_a_linear_curve_starts_at_zero():
    left, top, right, bottom = charts.PLOT
    laid = charts.chart([1, 2], log=False)
    assert laid["points"] == [(left, (top + bottom) / 2), (right, top)]
    assert laid["y_ticks"][0] == (bottom, "0")


def test_what_has_no_logarithm_is_drawn_linearly():
    assert not charts.chart([1, 0], log=True)["log"]


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("values", [[2.5], [2.5, 2.5, 2.5], [0.0]])
def test_a_constant_curve_is_drawn(values, log):
    left, top, right, bottom = charts.PLOT
    for x, y in charts.chart(values, log)["points"]:
        assert left <= x <= right
        assert top <= y <= bottom


def test_a_matrix_is_coloured_by_its_values():
    matrix = np.array([[-1, 0, 1], [-9, 0.25, 9]])
    pixels = decoded(charts.matrix_picture(matrix, -1, 1, ("#0000ff", "#ffffff", "#ff0000")))
    blue, white, red = [0, 0, 255], [255, 255, 255], [255, 0, 0]
    assert pixels.tolist() == [[blue, white, red], [blue, [255, 191, 191], red]]


def test_thumbnails_shrink_only_what_is_large():
    gradient = np.linspace(0, 255, 24 * 32 * 3).reshape(24, 32, 3).astype(np.uint8)
    small = decoded(charts.thumbnail(gradient))
    assert small.shape == (24, 32, 3)
    assert np.abs(small.astype(int) - gradient).max() < 12
    assert decoded(charts.thumbnail(np.zeros((300, 600, 3), np.uint8))).shape == (80, 160, 3)
