from dataclasses import astuple

import numpy as np
import pytest
import torch

from barlow import evaluate
from barlow.core import images, webdataset
from barlow.encoder.encoder import Encoder
from barlow.evaluation import features
from barlow.production import gate


def test_it_measures_an_encoder_as_evaluate_does(encoders, smoke):
    """The stage embeds with torch, the gate with onnxruntime; given the same features they say the same."""
    encoders("edges")
    measured = gate.measure(Encoder(), smoke)
    splits = {name: gate.embed(Encoder(), gate.labelled(name)) for name in ("train", "val", "test")}
    wanted = evaluate.score(splits, 4, smoke.evaluate, "pretrained").scores
    candidate = measured.candidate()
    for kind in ("linear", "knn"):
        assert astuple(getattr(candidate, kind)) == pytest.approx(astuple(getattr(wanted, kind)))
    assert measured.val.shape == (30 + 200, 12)  # val's, and as many of pretrain's as there are


def test_embeddings_are_those_of_the_images_in_order(encoders):
    encoders("edges")
    split = gate.embed(Encoder(), webdataset.read(webdataset.tars("test")))
    samples = list(webdataset.read(webdataset.tars("test")))
    assert split.keys == [sample.key for sample in samples]
    assert split.labels.tolist() == [sample.label for sample in samples]
    one_by_one = [Encoder().embed([images.decode(sample.data)])[0] for sample in samples[:5]]
    np.testing.assert_allclose(split.features[:5].numpy(), one_by_one, rtol=1e-5)


def test_the_paired_check_counts_discordant_images(smoke, change):
    right = torch.arange(1000) < 800
    other = right.clone()
    other[:30] = False  # only the challenger has these right
    other[800:810] = True  # and these only the champion
    new, old = (gate.Measured(torch.ones(2, 2), None, {"knn": each}) for each in (right, other))
    params = change(smoke, "promote", margin=0.5)
    check = next(gate.against(new, old, params))
    assert check.passed
    assert check.text.startswith("+2.0 points (+0.7 to +3.3)")
    check = next(gate.against(old, new, params))
    assert not check.passed
    assert check.text.startswith("-2.0 points (-3.3 to -0.7), the lower end at least -promote.margin=-0.5")


def test_parity_wants_the_same_images(encoders, smoke):
    encoders("edges")
    test = gate.embed(Encoder(), gate.labelled("test"))
    assert gate.parity(test, 0.9999).passed
    kept = features.load("pretrained", "test")
    features.save("pretrained", {"test": kept._replace(keys=kept.keys[::-1])})
    check = gate.parity(test, 0.9999)
    assert not check.passed
    assert "of other images or another encoder; run `dvc repro`" in check.text


def test_parity_sees_a_small_difference(encoders):
    encoders("edges")
    test = gate.embed(Encoder(), gate.labelled("test"))
    off = test.features + 0.1 * test.features.norm(dim=1, keepdim=True) * torch.eye(12)[0]
    assert not gate.parity(test._replace(features=off), 0.9999).passed
    assert not gate.parity(test._replace(features=test.features * float("nan")), 0.9999).passed


def test_the_reference_is_drawn_from_all_images(encoders):
    encoders("edges")
    few = gate.reference(Encoder(), 20)
    every = gate.embed(Encoder(), webdataset.read(webdataset.tars("pretrain"))).features.numpy()
    distances = np.abs(few[:, None] - every[None]).max(-1)
    numbers = distances.argmin(1)
    assert distances.min(1).max() < 1e-4
    assert len(set(numbers)) == 20
    assert numbers.max() > 100
    np.testing.assert_array_equal(few, gate.reference(Encoder(), 20))
