import dataclasses

import numpy as np
import pytest
import torch

from barlow import finetune
from barlow.core import files, images, progress, webdataset
from barlow.core.errors import UserError
from barlow.core.weights import save_weights
from barlow.encoder.encoder import Encoder
from barlow.evaluation.figures import Budget
from barlow.finetune import Study
from barlow.training import model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def params(smoke, change):
    return change(smoke, "finetune", steps=6, batch_size=16, lr=(0.02,), draws=2, label_shares=(0.5,))


@pytest.fixture
def encoder(project, smoke):
    torch.manual_seed(7)
    encoder = model.FrozenEncoder(smoke.model, smoke.views)
    identity = {name: dataclasses.asdict(getattr(smoke, name)) for name in ("model", "views", "pretrain")}
    save_weights(files.ENCODER, encoder.state_dict(), identity | {"data": "d1"})
    return encoder


def test_figures_and_learning_rates(encoder, params, change, capsys):
    finetune.run(change(params, "finetune", supervised_budget=0.1))
    metrics = files.read_json("reports/finetune.json")
    half, supervised = metrics["fine_tuned"]["50 %"], metrics["supervised"]
    for network in (half["pretrained"], half["random"], supervised["network"]):
        accuracy = network["accuracy"]
        assert 0 <= accuracy["low"] <= accuracy["top1"] <= accuracy["high"] <= 100
        assert network["lr"] == 0.02
    assert (half["budget"], half["images"]) == ({"per_class": None, "share": 0.5}, 32)  # 8 of 15 per class
    # 2 epochs of 3 batches of 64 are 384 images; a tenth of them in batches of 16
    assert supervised["images_seen"] == 2 * 16
    top1 = supervised["network"]["accuracy"]["top1"]
    assert f"supervised                  {top1:.1f} (" in capsys.readouterr().out


def test_the_supervised_network_can_be_left_out(encoder, params, change):
    finetune.run(change(params, "finetune", supervised_budget=0.0, draws=1, steps=1))
    metrics = files.read_json("reports/finetune.json")
    assert metrics["supervised"] is None
    assert list(metrics["fine_tuned"]) == ["50 %"]


def test_training_learns_the_labels_it_is_given_and_starts_where_it_is_told(encoder, params, change):
    """All weights move, the labels are learnt, and no steps at a rate of 0 leave the start as it was."""
    study = Study(change(params, "finetune", batch_size=32))
    start = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    learnt = study.top1(study.train(start, study.labelled, 0.05, 40), "train")
    assert learnt > 60
    assert learnt > study.top1(study.train(start, study.labelled, 1e-9, 2), "train") + 20
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, start[name])  # the caller's weights are not touched


def test_only_the_drawn_images_are_trained_on(encoder, params):
    study, seen = Study(params), []

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))

        def forward(self, view):
            seen.append(view.shape)
            return self.weight.expand(len(view), 4)

    read = study.samples.read
    asked = []
    study.samples.read = lambda numbers: asked.append(numbers) or read(numbers)
    study.fit(Recorder(), np.array([3, 8, 11]), 0.1, 6)
    assert seen == [(16, 3, 24, 24)] * 6
    assert set(np.concatenate(asked).tolist()) == {3, 8, 11}


@pytest.fixture
def recorded(encoder, params, change, monkeypatch):
    """Record what is trained and on what it is looked at, and train nothing; a learning rate of 0.2 is best."""

    def record(lr):
        study = Study(change(params, "finetune", lr=lr, supervised_budget=1.0))
        trained, seen = [], []
        accuracies = {0.1: 30.0, 0.2: 50.0, 0.3: 40.0}
        monkeypatch.setattr(study, "train", lambda start, numbers, lr, steps: trained.append((lr, steps)) or lr)
        monkeypatch.setattr(study, "top1", lambda lr, split: seen.append((lr, split)) or accuracies[lr])
        return study, trained, seen

    return record


def test_the_learning_rate_is_chosen_on_val_in_the_first_draw(recorded):
    study, trained, seen = recorded((0.1, 0.2, 0.3))
    tuned = study.fine_tune(Budget(None, 0.5), {})
    assert (tuned.pretrained.lr, tuned.random.lr) == (0.2, 0.2)
    assert trained == 2 * [(0.1, 6), (0.2, 6), (0.3, 6), (0.2, 6)]  # from both starts
    assert seen == 2 * [(0.1, "val"), (0.2, "val"), (0.3, "val"), (0.2, "test"), (0.2, "test")]


def test_both_starts_get_the_same_labels(encoder, params, monkeypatch):
    study, starts = Study(params), {"pretrained": [], "random": []}

    def best(start, numbers, lrs, steps):
        starts["random" if start is None else "pretrained"].append(numbers.tolist())
        return lrs[0], None

    monkeypatch.setattr(study, "best", best)
    monkeypatch.setattr(study, "top1", lambda trained, split: 50.0)
    study.fine_tune(Budget(None, 0.5), {})
    assert starts["pretrained"] == starts["random"]
    first, second = starts["random"]
    assert first != second


def test_the_supervised_network_chooses_it_in_shorter_trials(recorded):
    study, trained, seen = recorded((0.1, 0.2))
    assert study.supervised().network.lr == 0.2
    assert trained == [(0.1, 2), (0.2, 2), (0.2, 24)]  # 2 epochs of 3 batches of 64 in batches of 16
    assert seen == [(0.1, "val"), (0.2, "val"), (0.2, "test")]


def test_with_one_learning_rate_there_is_nothing_to_choose(recorded):
    study, trained, seen = recorded((0.3,))
    study.fine_tune(Budget(None, 0.5), {})
    study.supervised()
    assert trained == [(0.3, 6)] * 4 + [(0.3, 24)]
    assert seen == [(0.3, "test")] * 5


@pytest.fixture
def unlabelled(encoder, small_shards):
    files.SHARDS.unlink()
    for split in ("pretrain", "train", "val", "test"):
        samples = webdataset.read(webdataset.tars(split, small_shards))
        webdataset.write(files.SHARDS / f"{split}-000000.tar", (sample._replace(label=-1) for sample in samples))
    files.write_json(files.SHARDS / webdataset.CLASSES_FILE, [])


def test_without_labels_there_is_nothing_to_finetune(unlabelled, params):
    finetune.run(params)
    metrics = files.read_json("reports/finetune.json")
    assert (metrics["fine_tuned"], metrics["supervised"]) == ({}, None)


def test_progress_is_told_where_there_is_no_terminal(encoder, params, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0)
    study = Study(params)
    study.train(None, study.labelled, 0.02, 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"60 images, learning rate 0.02: step {step} of 3" for step in (1, 2, 3)]
    monkeypatch.setattr(progress, "SECONDS", 60)
    study.train(None, study.labelled, 0.02, 3)
    assert capsys.readouterr().out == ""


def test_without_draws_nothing_is_trained(encoder, params, change, monkeypatch):
    monkeypatch.setattr(Study, "train", lambda *_: pytest.fail("a network was trained"))
    finetune.run(change(params, "finetune", draws=0, supervised_budget=0.0))
    metrics = files.read_json("reports/finetune.json")
    assert (metrics["fine_tuned"], metrics["supervised"]) == ({}, None)


def test_all_labels_write_a_classifier_that_has_learnt_them(encoder, params, change, monkeypatch):
    """60 steps from random weights; the file has the network that was trained, and no study is written."""
    trained, train = [], Study.train
    monkeypatch.setattr(Study, "train", lambda *given: trained.append(train(*given)) or trained[-1])
    finetune.run(change(params, "finetune", batch_size=32, steps=1, classifier_epochs=32, lr=(0.05,)), all_labels=True)
    samples = list(webdataset.read(webdataset.tars("train")))
    logits = Encoder(files.CLASSIFIER).classify([images.decode(sample.data) for sample in samples])
    assert 100 * np.mean(logits.argmax(1) == [sample.label for sample in samples]) > 60
    [(own, _)] = trained
    pixels = np.stack([images.decode(sample.data) for sample in samples[:8]])
    found = Encoder(files.CLASSIFIER).embed(pixels)
    np.testing.assert_allclose(own(torch.from_numpy(pixels)).numpy(), found, rtol=1e-4, atol=1e-4)
    assert not torch.equal(own.backbone.conv1.weight, encoder.backbone.conv1.weight)  # the whole network was trained
    assert files.read_json(files.CLASSIFYING)["steps"] == 60  # 32 epochs of 60 images in batches of 32
    assert not files.FINETUNING.exists()


def test_a_small_set_gets_as_many_steps_as_the_study_and_val_chooses_the_rate(recorded, params, change, monkeypatch):
    study, trained, seen = recorded((0.1, 0.2, 0.3))
    monkeypatch.setattr(finetune, "Study", lambda _: study)
    with pytest.raises(TypeError):  # `train` is a stand-in: there is no network to write
        finetune.run(change(params, "finetune", steps=50, classifier_epochs=1, lr=(0.1, 0.2, 0.3)), all_labels=True)
    assert trained == [(0.1, 50), (0.2, 50), (0.3, 50)]
    assert seen == [(0.1, "val"), (0.2, "val"), (0.3, "val")]


def test_a_classifier_needs_labels(unlabelled, params):
    with pytest.raises(UserError, match=r"^data/shards has no labelled images in train, val, test, and --all-labels"):
        finetune.run(params, all_labels=True)
    assert not files.CLASSIFIER.exists()


def test_a_classifier_has_the_network_that_was_pretrained(encoder, params, change):
    with pytest.raises(UserError, match=r"views differs from that of models/encoder\.safetensors; run `dvc repro`"):
        finetune.run(change(params, "views", size=32), all_labels=True)


def test_training_that_diverges_is_told(encoder, params, change):
    with pytest.raises(UserError, match=r"finetune\.lr=\[1e\+30\]: the network diverged to NaN; add a lower"):
        finetune.run(change(params, "finetune", lr=(1e30,)), all_labels=True)
    assert not files.CLASSIFIER.exists()
