import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from barlow.advice import survey
from barlow.advice.recipe import Images
from barlow.core import webdataset
from barlow.core.bands import PixelFormat
from barlow.core.errors import UserError
from barlow.data import manifest


@pytest.fixture
def accepted(tmp_path):
    """`accepted(pixels, splits, mode)` writes an image per split, and returns the rows of the manifest."""

    def accepted(splits, draw, side=(60, 90), mode=None):
        rows = []
        for i, split in enumerate(splits):
            image = draw(i, side)
            image.save(tmp_path / f"{i}.jpg", quality=90)
            row = {"path": f"{i}.jpg", "split": split, "label": None if split == "pretrain" else "a"}
            row |= {"width": side[0] + i, "height": side[1] + i, "mode": mode or image.mode}
            rows.append(dict.fromkeys(manifest.SCHEMA.names) | row)
        return pa.Table.from_pylist(rows, manifest.SCHEMA)

    return accepted


def colour(i, side):
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (*side[::-1], 3), dtype=np.uint8))


def grey(i, side):
    return colour(i, side).convert("L")


def grey_rgb(i, side):
    return grey(i, side).convert("RGB")


SPLITS = ["pretrain", "train", "train", "val", "test", "test"]


def test_the_facts_are_of_the_images_to_pretrain_on(accepted, tmp_path):
    table = accepted(SPLITS, colour)
    found = survey.look(table, tmp_path, None, tmp_path / "a.tar")
    assert found == Images(3, 61, 91, False, {"train": 2, "val": 1, "test": 2})  # of 60, 61, 62 and 90, 91, 92 px


@pytest.mark.parametrize(("draw", "wanted"), [(colour, False), (grey, True), (grey_rgb, True)])
def test_grey_is_told_by_the_pixels_and_not_by_the_mode(accepted, tmp_path, draw, wanted):
    assert survey.look(accepted(SPLITS, draw), tmp_path, None, tmp_path / "a.tar").grey is wanted
    assert survey.look(accepted(SPLITS, draw, mode="RGB"), tmp_path, None, tmp_path / "a.tar").grey is wanted


def test_some_colour_makes_a_colour_set(accepted, tmp_path):
    mixed = accepted(["train"] * 10, lambda i, side: colour(i, side) if i == 3 else grey_rgb(i, side))
    assert not survey.look(mixed, tmp_path, None, tmp_path / "a.tar").grey


def test_the_sample_is_a_shard_of_shrunk_images(accepted, tmp_path):
    survey.look(accepted(SPLITS, colour), tmp_path, 30, tmp_path / "a.tar")
    samples = list(webdataset.read([tmp_path / "a.tar"]))
    assert [(max(s.height, s.width), s.label) for s in samples] == [(30, -1)] * 3
    assert len({s.data for s in samples}) == 3


@pytest.mark.parametrize("form", [PixelFormat(1, 16), PixelFormat(3, 16), PixelFormat(4, 8)])
def test_images_of_other_formats_are_sampled_as_arrays(accepted, tmp_path, form):
    draw = {1: grey, 3: colour, 4: lambda i, side: colour(i, side).convert("CMYK")}[form.channels]
    found = survey.look(accepted(SPLITS, draw), tmp_path, 30, tmp_path / "a.tar", form)
    assert found.grey is (form.channels != 3)  # there are no colours to change
    samples = webdataset.Samples([tmp_path / "a.tar"])
    assert samples.form == form
    assert [pixels.shape for pixels in samples.stored(np.arange(3))] == [
        (*sides, form.channels) for sides in samples.sides
    ]
    assert samples.sides.max() == 30


def test_many_large_images_are_not_all_decoded(accepted, tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "SAMPLE", (2, 5))
    monkeypatch.setattr(survey, "SAMPLE_PIXELS", 3 * 65 * 95)
    assert survey.look(accepted(["train"] * 10, colour), tmp_path, None, tmp_path / "a.tar").count == 10
    assert webdataset.count([tmp_path / "a.tar"]) in (2, 3)


def test_nothing_to_train_on_and_a_file_that_is_gone(accepted, tmp_path):
    with pytest.raises(UserError, match="no image of the splits pretrain and train"):
        survey.look(accepted(["test"], colour), tmp_path, None, tmp_path / "a.tar")
    table = accepted(["train"], colour)
    (tmp_path / "0.jpg").unlink()
    with pytest.raises(UserError, match=r"0\.jpg cannot be read any more .*run `barlow ingest` again"):
        survey.look(table, tmp_path, None, tmp_path / "a.tar")
