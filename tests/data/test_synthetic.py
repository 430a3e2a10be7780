import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from barlow.data import synthetic


@pytest.fixture
def written(smoke, tmp_path):
    p = dataclasses.replace(smoke.ingest.synthetic, unlabelled=30, train=20, val=10, test=10, defects=8)
    synthetic.write(tmp_path / "a", p)
    return p, tmp_path


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def test_same_params_same_bytes_and_another_seed_others(written):
    p, folder = written
    synthetic.write(folder / "b", p)
    synthetic.write(folder / "c", dataclasses.replace(p, seed=1))
    a, b, c = (tree(folder / name) for name in "abc")
    assert a == b
    assert not set(a.values()) - {b""} & set(c.values())


# Pixels (3, 5) and (12, 12) of a surface of 24 x 24 pixels, of `default_rng(7)`, and the mean of all.
PIXELS = {
    "bricks": ([114, 124, 119], [159, 166, 167], 143.637),
    "cells": ([55, 63, 62], [85, 79, 91], 80.637),
    "checker": ([61, 70, 65], [159, 166, 167], 112.954),
    "chevron": ([168, 178, 173], [82, 90, 91], 112.37),
    "dots": ([168, 178, 173], [56, 64, 65], 90.235),
    "grain": ([84, 88, 85], [123, 121, 119], 130.641),
    "mesh": ([141, 151, 146], [82, 90, 91], 125.806),
    "rings": ([87, 97, 92], [133, 141, 142], 111.468),
    "waves": ([141, 151, 146], [107, 115, 116], 112.843),
    "weave": ([93, 102, 98], [159, 166, 167], 113.245),
}


@pytest.mark.parametrize("family", synthetic.FAMILIES)
def test_the_pixels_are_those_of_earlier_versions(family):
    """Published results are of these images. One step of difference is rounding on another processor."""
    pixels = synthetic.surface(family, 24, np.random.default_rng(7)).astype(float)
    left, middle, mean = PIXELS[family]
    np.testing.assert_allclose([pixels[3, 5], pixels[12, 12]], [left, middle], atol=1)
    assert pixels.mean() == pytest.approx(mean, abs=0.01)


def test_counts_and_layout(written):
    files = tree(written[1] / "a")
    splits = [path.split("/")[0] for path in files]
    assert {split: splits.count(split) for split in set(splits)} == {
        "unlabelled": 38,
        "train": 20,
        "val": 10,
        "test": 10,
    }
    assert {path.split("/")[1] for path in files if path.startswith("train")} <= set(synthetic.FAMILIES)


def test_more_images_do_not_change_the_first_ones(written):
    p, folder = written
    synthetic.write(folder / "more", dataclasses.replace(p, unlabelled=40, defects=0))
    more = tree(folder / "more")
    assert all(more[path] == data for path, data in tree(folder / "a").items() if "/0" in path)


def test_defects_are_planted(written):
    files = tree(written[1] / "a" / "unlabelled")
    kinds = {
        kind: [data for path, data in files.items() if path.startswith(kind)]
        for kind in ("trunc", "empty", "dup", "tiny")
    }
    assert [len(contents) for contents in kinds.values()] == [2, 2, 2, 2]
    assert kinds["empty"] == [b"", b""]
    assert all(data in [other for path, other in files.items() if path[0] == "0"] for data in kinds["dup"])
    assert all(min(Image.open(io.BytesIO(data)).size) < 16 for data in kinds["tiny"])
    with pytest.raises(OSError, match=r"(?i)truncated"):
        Image.open(io.BytesIO(kinds["trunc"][0])).load()


def test_no_label_leaks_into_colour_or_brightness():
    """A classifier on brightness and colour alone stays near chance, which is 10 %."""
    families = list(synthetic.FAMILIES)
    rows, labels = [], []
    for i in range(1200):
        rng = np.random.default_rng([9, i])
        label = int(rng.integers(10))
        pixels = synthetic.surface(families[label], 48, rng).astype(float)
        rows.append([*pixels.mean((0, 1)), np.median(pixels)])
        labels.append(label)
    x, y = np.array(rows), np.array(labels)
    x = (x - x.mean(0)) / x.std(0)
    accuracy = LogisticRegression(max_iter=1000).fit(x[:800], y[:800]).score(x[800:], y[800:])
    assert accuracy < 0.2
