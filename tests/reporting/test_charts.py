import math

import pytest

from barlow.reporting import charts


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
    laid = charts.curves([[100, 10, 1]], log=True)
    assert laid["lines"][0] == [(left, top), ((left + right) / 2, (top + bottom) / 2), (right, bottom)]
    assert ((top + bottom) / 2, "10") in laid["y_ticks"]
    assert [text for _, text in laid["x_ticks"]] == ["1", "2", "3"]


def test_a_linear_curve_starts_at_zero():
    left, top, right, bottom = charts.PLOT
    laid = charts.curves([[1, 2]], log=False)
    assert laid["lines"][0] == [(left, (top + bottom) / 2), (right, top)]
    assert laid["y_ticks"][0] == (bottom, "0")


def test_what_has_no_logarithm_is_drawn_linearly():
    assert not charts.curves([[1, 0]], log=True)["log"]


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("values", [[2.5], [2.5, 2.5, 2.5], [0.0]])
def test_a_constant_curve_is_drawn(values, log):
    left, top, right, bottom = charts.PLOT
    for x, y in charts.curves([values], log)["lines"][0]:
        assert left <= x <= right
        assert top <= y <= bottom


def test_curves_of_two_runs_share_their_axes():
    left, top, right, bottom = charts.PLOT
    first, second = charts.curves([[4, 2, 0], [2]], log=False)["lines"]
    assert first == [(left, top), ((left + right) / 2, (top + bottom) / 2), (right, bottom)]
    assert second == [(left, (top + bottom) / 2)]


def test_points_lie_by_the_logarithm_with_interval_and_dots():
    _, top, _, bottom = charts.TALL
    line = [charts.Point(10, 50, 40, 75, [25]), charts.Point(100, 0, 0, 0), charts.Point(1000, 100, 100, 100)]
    laid = charts.points({"a": line})
    first, second, third = laid["series"]["a"]
    assert second["x"] == (first["x"] + third["x"]) / 2
    assert (second["y"], third["y"]) == (bottom, top)
    middle, step = (top + bottom) / 2, (bottom - top) / 4
    assert (first["y"], first["low"], first["high"]) == (middle, round(middle + 0.4 * step, 1), middle - step)
    assert first["dots"] == [middle + step]
    assert laid["x_ticks"] == [(first["x"], "10"), (second["x"], "100"), (third["x"], "1,000")]


def test_series_at_one_place_do_not_hide_each_other():
    laid = charts.points({name: [charts.Point(10, 50, 40, 60)] for name in "abc"})["series"]
    places = [laid[name][0]["x"] for name in "abc"]
    assert places == [places[1] - charts.SHIFT, places[1], places[1] + charts.SHIFT]


def test_ticks_leave_room_for_their_text():
    assert charts.apart([0, 10, 33, 35, 70], place=lambda value: value) == [0, 35, 70]


@pytest.mark.parametrize("label", range(12))
def test_shapes_are_about_as_large(label):
    """By the shoelace formula, over the corners that the path's relative moves give."""
    path = charts.shape(label, 7, 9, 5)
    x, y = map(float, path[1:].replace("h", " ").replace("l", " ").replace("a", " ").split()[:2])
    if "a" in path:
        assert (x, y) == (2, 9)
        return
    corners = [(x, y)]
    for kind, numbers in charts_moves(path):
        dx, dy = {"l": numbers, "h": (*numbers, 0), "v": (0, *numbers)}[kind]
        corners.append((corners[-1][0] + dx, corners[-1][1] + dy))
    area = abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(corners, corners[1:] + corners[:1], strict=True))) / 2
    assert 0.7 < area / (math.pi * 25) < 1.3


def charts_moves(path):
    import re

    for kind, text in re.findall(r"([lhv])([-\d. ]+)", path):
        yield kind, tuple(map(float, text.split()))


def test_fifty_labels_look_different():
    looks = {(label % 10, charts.shape(label, 0, 0, 1)) for label in range(50)}
    assert len(looks) == 50
