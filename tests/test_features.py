import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional

from barlow import features, files, images, model, shards
from barlow.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def encoder(project, smoke):
    torch.manual_seed(7)
    return model.FrozenEncoder(smoke.model, smoke.views)


def one_by_one(encoder, samples):
    return torch.cat([encoder(torch.tensor(images.decode(sample.data))[None]) for sample in samples])


def resized(sample, size):
    buffer = io.BytesIO()
    Image.fromarray(images.decode(sample.data)).resize(size).save(buffer, "PNG")
    return sample._replace(data=buffer.getvalue(), extension="png", height=size[1], width=size[0])


@pytest.mark.parametrize("chunk", [2, 5, 256])
def test_images_of_mixed_sizes_are_embedded_in_order(encoder, project, monkeypatch, chunk):
    monkeypatch.setattr(features, "CHUNK", chunk)
    train = list(shards.read(shards.tars("train")))[:5]
    sizes = [(30, 20), (50, 60), (8, 9), (24, 24), (100, 10)]
    mixed = [resized(sample, size) for sample, size in zip(train, sizes, strict=True)]
    shards.write(project / "mixed.tar", mixed)
    split = features.embed(encoder, shards.read([project / "mixed.tar"]), CPU)
    torch.testing.assert_close(split.features, one_by_one(encoder, mixed), atol=1e-4, rtol=1e-4)
    assert split.labels.tolist() == [0, 1, 2, 3, 0]
    assert split.keys == [f"train{i:04d}" for i in range(5)]
    assert not split.features.is_inference()  # the probe learns from them


def test_the_network_sees_the_bits_of_preprocess(encoder):
    """Whatever is computed in one go and whatever image by image; of all sizes, and laid out in memory as ever."""
    sizes = [(24, 24), (30, 20), (8, 9), (1, 1), (100, 10), (1600, 1200)]
    samples = [resized(next(features.labelled("train")), size) for size in sizes]
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features.embed(encoder, iter(samples), CPU)

    def preprocessed(data):
        planes = torch.tensor(images.decode(data))[None].permute(0, 3, 1, 2).float()
        planes = functional.interpolate(planes, (encoder.size, encoder.size), mode="bilinear", antialias=True)
        return (planes - encoder.mean) / encoder.std

    expected = torch.cat([preprocessed(sample.data) for sample in samples])
    assert torch.equal(seen[0], expected)
    assert seen[0].stride() == expected.stride()
    assert torch.equal(
        torch.cat([encoder.preprocess(torch.tensor(images.decode(s.data))[None]) for s in samples]), expected
    )


def test_of_no_images_there_are_no_features(encoder):
    split = features.embed(encoder, iter([]), CPU)
    assert (split.features.shape, split.labels.shape, split.keys) == ((0, 512), (0,), [])


def test_labelled_images_only(encoder):
    assert [sample.label for sample in features.labelled("val")] == [i % 4 for i in range(30)]
    assert list(features.labelled("pretrain")) == []


def test_knn_on_val_equals_scikit_learn(encoder):
    train, val = (list(features.labelled(split)) for split in ("train", "val"))
    knn = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.1))
    knn.fit(one_by_one(encoder, train), [sample.label for sample in train])
    expected = 100 * knn.score(one_by_one(encoder, val), [sample.label for sample in val])
    assert features.knn_on_val(encoder, CPU) == {"knn_val_top1": pytest.approx(expected)}


@pytest.mark.parametrize("split", ["train", "val"])
def test_knn_on_val_needs_labels_in_both(encoder, project, small_shards, split):
    folder = project / "data/shards"
    folder.unlink()
    for name in ("train", "val"):
        samples = shards.read(shards.tars(name, small_shards))
        shards.write(folder / f"{name}-000000.tar", (s._replace(label=-1) if name == split else s for s in samples))
    files.write_json(folder / shards.CLASSES, shards.classes(small_shards))
    assert features.knn_on_val(encoder, CPU) == {}


def test_knn_on_val_without_the_splits(encoder, project):
    (project / "data/shards").unlink()
    assert features.knn_on_val(encoder, CPU) == {}


def test_what_is_kept_is_read_again(project):
    kept = {
        "train": features.Split(torch.randn(3, 4), torch.tensor([2, 0, 1]), ["a", "bcd", "ef"]),
        "test": features.Split(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), []),
    }
    features.save("pretrained", kept)
    for name, split in kept.items():
        found = features.load("pretrained", name)
        assert torch.equal(found.features, split.features)
        assert torch.equal(found.labels, split.labels)
        assert found.keys == split.keys


def test_what_was_not_kept_is_missing(project):
    with pytest.raises(UserError, match=r"data/features/random\.safetensors is missing; run `barlow extract`"):
        features.load("random", "test")
