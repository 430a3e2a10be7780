import dataclasses
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from barlow import extract
from barlow.core import files, images, webdataset
from barlow.core.errors import UserError
from barlow.core.weights import save_weights
from barlow.evaluation import features
from barlow.training import health, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_shards, smoke, one_thread):
    """A project in which `extract` ran."""
    folder = tmp_path_factory.mktemp("extract")
    (folder / "data").mkdir()
    (folder / "data/shards").symlink_to(small_shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(7)
        encoder = model.FrozenEncoder(smoke.model, smoke.views)
        identity = {"model": dataclasses.asdict(smoke.model), "views": dataclasses.asdict(smoke.views)}
        save_weights(files.ENCODER, encoder.state_dict(), identity)
        extract.run(smoke)
    return folder


@pytest.fixture
def extracted(folder, monkeypatch):
    monkeypatch.chdir(folder)


def unlabelled(folder, source, *splits):
    """Fill a folder with shards of which some splits have no labels."""
    for split in ("pretrain", "train", "val", "test"):
        samples = webdataset.read(webdataset.tars(split, source))
        webdataset.write(
            folder / f"{split}-000000.tar", (s._replace(label=-1) if split in splits else s for s in samples)
        )
    files.write_json(folder / webdataset.CLASSES_FILE, webdataset.classes(source))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_features_are_those_of_the_encoder_image_by_image(extracted, split):
    encoder = model.load_encoder()[0]
    samples = list(webdataset.read(webdataset.tars(split)))
    expected = torch.cat([encoder(torch.tensor(images.decode(sample.data))[None]) for sample in samples])
    found = features.load("pretrained", split)
    torch.testing.assert_close(found.features, expected, atol=1e-4, rtol=1e-4)
    assert found.labels.tolist() == [sample.label for sample in samples]
    assert found.keys == [sample.key for sample in samples]


def test_the_random_encoder_is_another_of_the_same_shape_and_the_same_each_time(extracted, smoke):
    found = features.load("random", "test")
    assert found.features.shape == (60, 512)
    assert not torch.allclose(found.features, features.load("pretrained", "test").features, atol=0.1)
    torch.manual_seed(smoke.extract.seed)
    encoder = model.FrozenEncoder(smoke.model, smoke.views)
    features.whiten(encoder, torch.device("cpu"))
    again = features.embed(encoder, features.labelled("test"), torch.device("cpu"))
    torch.testing.assert_close(found.features, again.features)


def test_pixels_are_the_image_shrunk(extracted, smoke):
    sample = next(webdataset.read(webdataset.tars("val")))
    image = Image.fromarray(images.decode(sample.data)).resize((24, 24), Image.Resampling.BILINEAR)
    found = features.load("pixels", "val")
    assert (found.features.shape, found.features.dtype) == ((30, 3 * 24 * 24), torch.uint8)
    planes = found.features[0].reshape(3, 24, 24).permute(1, 2, 0).numpy()
    assert np.abs(planes.astype(int) - np.asarray(image).astype(int)).max() <= 1  # rounding


def test_baselines_can_be_left_out(folder, tmp_path, monkeypatch, smoke, change):
    monkeypatch.chdir(tmp_path)
    for name in ("data/shards", "models"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder / name)
    extract.run(change(smoke, "extract", baselines=False))
    assert [path.name for path in files.FEATURES.iterdir()] == ["pretrained.safetensors"]


def test_given_weights_are_compared_and_what_a_run_started_from(folder, tmp_path, monkeypatch, smoke, change):
    monkeypatch.chdir(tmp_path)
    for name in ("data/shards", "models"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder / name)
    torch.manual_seed(8)
    other = model.FrozenEncoder(smoke.model, smoke.views)
    torch.save(other.backbone.state_dict(), "other.pth")
    features.save("stale", {})
    params = change(smoke, "extract", baselines=False, weights=("other.pth",))
    extract.run(change(params, "model", weights=str(files.ENCODER)))
    assert features.kept() == ["pretrained", "start", "other"]
    features.whiten(other, torch.device("cpu"))
    wanted = features.embed(other, features.labelled("test"), torch.device("cpu")).features
    torch.testing.assert_close(features.load("other", "test").features, wanted)
    # the same backbone as the pretrained encoder, before the whitening
    start, pretrained = (features.load(name, "health").features for name in ("start", "pretrained"))
    torch.testing.assert_close(start, pretrained)


@pytest.mark.parametrize("weights", [("a/x.pth", "b/x.pth"), ("random.pth",), ("data/start.safetensors",)])
def test_two_rows_of_one_name_are_refused(smoke, change, weights):
    with pytest.raises(UserError, match=r"extract\.weights\[\d\]=.* would be called '\w+' in the tables, like another"):
        extract.given(change(smoke, "extract", weights=weights))


def test_the_views_are_pairs(extracted):
    """Two views of one image are more alike than those of two images."""
    view_a, view_b = (features.load("pretrained", name).features for name in ("view_a", "view_b"))
    assert len(view_a) == len(view_b) == 200
    assert health.alignment(view_a, view_b) < health.alignment(view_a, view_b.roll(1, 0))


def test_health_looks_at_pretrain_where_val_is_small(extracted):
    keys = [sample.key for sample in webdataset.read(webdataset.tars("pretrain"))]
    assert features.load("pretrained", "health").keys == keys


def test_health_looks_at_val_where_it_is_large(extracted, monkeypatch, smoke):
    monkeypatch.setattr(extract, "MIN_HEALTH_IMAGES", 10)
    splits = extract.health(model.load_encoder()[0], smoke, torch.device("cpu"))
    assert splits["health"].keys == [sample.key for sample in webdataset.read(webdataset.tars("val"))]
    assert len(splits["view_a"].features) == 30


def test_of_a_test_split_without_labels_the_first_images_are_kept(tmp_path, monkeypatch, small_shards):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extract, "HEALTH_IMAGES", 7)
    unlabelled(files.SHARDS, small_shards, "train", "test")
    found = list(extract.images_of("test"))
    assert [sample.key for sample in found] == [s.key for s in islice(webdataset.read(webdataset.tars("test")), 7)]
    assert list(extract.images_of("train")) == []
    assert len(list(extract.images_of("val"))) == 30


def test_there_is_nothing_to_extract_without_an_encoder(project, smoke):
    with pytest.raises(UserError, match=r"models/encoder\.safetensors is missing; run `barlow pretrain`"):
        extract.run(smoke)
