import csv
import dataclasses

import numpy as np
import pytest
import torch

from barlow import evaluate, files, images, model, shards


@pytest.fixture
def encoder(project, smoke):
    torch.manual_seed(7)
    encoder = model.FrozenEncoder(smoke.model, smoke.views)
    identity = {"model": dataclasses.asdict(smoke.model), "views": dataclasses.asdict(smoke.views)}
    model.save_weights(files.ENCODER, encoder.backbone.state_dict(), identity)
    return encoder


def unlabel(folder, source, *splits):
    """Replace data/shards by a copy of which some splits have no labels."""
    folder.unlink()
    for split in ("pretrain", "train", "val", "test"):
        samples = shards.read(shards.tars(split, source))
        shards.write(folder / f"{split}-000000.tar", (s._replace(label=-1) if split in splits else s for s in samples))
    files.write_json(folder / shards.CLASSES, shards.classes(source))


def test_figures_are_those_of_the_features(encoder, smoke, capsys):
    evaluate.run(smoke)
    metrics = files.read_json("reports/evaluate.json")
    assert (metrics["train_images"], metrics["val_images"], metrics["test_images"], metrics["classes"]) == (
        60,
        30,
        60,
        4,
    )

    test = list(shards.read(shards.tars("test")))
    features = torch.cat([encoder(torch.tensor(images.decode(sample.data))[None]) for sample in test])
    labels = torch.tensor([sample.label for sample in test])
    tensors, metadata = model.load_weights(files.FEATURES)
    torch.testing.assert_close(tensors["features"], features, atol=1e-4, rtol=1e-4)
    assert metadata["keys"] == [sample.key for sample in test]

    head, head_metadata = model.load_weights(files.HEAD)
    predictions = (tensors["features"] @ head["weight"].T + head["bias"]).argmax(1)
    assert metrics["linear_top1"] == pytest.approx(100 * (predictions == labels).double().mean().item())
    assert metrics["linear_top1_low"] < metrics["linear_top1"] < metrics["linear_top1_high"]
    assert head_metadata["classes"] == shards.classes()
    with files.CONFUSION.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = shards.classes()
    assert [row["actual"] for row in rows] == [names[i] for i in labels]
    assert [row["predicted"] for row in rows] == [names[i] for i in predictions]
    assert f"{metrics['linear_top1']:.1f} (" in capsys.readouterr().out


def test_it_is_deterministic_and_the_random_encoder_is_another(encoder, smoke):
    evaluate.run(smoke)
    first = files.REPORTS.joinpath("evaluate.json").read_bytes()
    evaluate.run(smoke)
    assert files.REPORTS.joinpath("evaluate.json").read_bytes() == first
    metrics = files.read_json("reports/evaluate.json")
    assert metrics["random_effective_rank"] != metrics["effective_rank"]
    assert {f"random_{name}" for name in ("linear_top1", "knn_top1", "knn_top1_low", "alignment")} <= metrics.keys()


def test_the_probe_does_not_see_test_labels(encoder, smoke, project, small_shards):
    """Shuffled test labels change the accuracy and nothing that was fitted."""
    evaluate.run(smoke)
    head = files.HEAD.read_bytes()
    folder = project / "data/shards"
    folder.unlink()
    rng = np.random.default_rng(0)
    for split in ("pretrain", "train", "val", "test"):
        samples = list(shards.read(shards.tars(split, small_shards)))
        if split == "test":
            samples = [s._replace(label=int(rng.integers(4))) for s in samples]
        shards.write(folder / f"{split}-000000.tar", samples)
    files.write_json(folder / shards.CLASSES, shards.classes(small_shards))
    evaluate.run(smoke)
    assert files.HEAD.read_bytes() == head


def test_without_labels_health_is_all(encoder, smoke, project, small_shards):
    unlabel(project / "data/shards", small_shards, "val", "test")
    evaluate.run(smoke)
    metrics = files.read_json("reports/evaluate.json")
    assert not [name for name in metrics if "top1" in name]
    assert metrics["effective_rank"] > 1
    assert metrics["alignment"] > 0 > metrics["uniformity"]
    assert model.load_weights(files.HEAD) == ({}, {"classes": []})
    tensors, metadata = model.load_weights(files.FEATURES)  # for the nearest neighbours in the report
    assert tensors["features"].shape == (60, 512)
    assert set(tensors["labels"].tolist()) == {-1}
    assert metadata["keys"] == [sample.key for sample in shards.read(shards.tars("test"))]
    assert files.CONFUSION.read_text().splitlines() == ["actual,predicted"]


def test_health_looks_at_pretrain_where_val_is_small(encoder, smoke, monkeypatch):
    for minimum, expected in {10: 30, 100: 200}.items():
        monkeypatch.setattr(evaluate, "MIN_HEALTH_IMAGES", minimum)
        figures = evaluate.health(encoder, smoke.views, 0, torch.device("cpu"))
        assert figures["health_images"] == expected
