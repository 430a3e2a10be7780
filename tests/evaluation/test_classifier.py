import dataclasses
import json

import numpy as np
import pytest
import torch
from services import client, encoded, files_of, hosting
from torchvision.transforms import v2

from barlow import evaluate, index
from barlow.core import files, images, webdataset
from barlow.encoder.encoder import Encoder, softmax
from barlow.evaluation import classifier, features, figures, intervals, onnx_file, probe
from barlow.evaluation.figures import Images
from barlow.serving.app import app
from barlow.settings.flags import Flags
from barlow.training import model

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(split):
    return [images.decode(sample.data) for sample in webdataset.read(webdataset.tars(split))]


def network(smoke, seed):
    """A network that was never trained, with a probe on top, and its encoder."""
    torch.manual_seed(seed)
    encoder = model.FrozenEncoder(smoke.model, smoke.views)
    train, val = (
        features.embed(encoder, features.labelled(name), torch.device("cpu"))[:2] for name in ("train", "val")
    )
    weight, bias, _ = probe.choose_linear(train, val, 4, smoke.evaluate.probe_l2)  # nothing is better on val
    return onnx_file.Exported(encoder, {"weight": weight, "bias": bias}).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory, small_shards, smoke, one_thread):
    """A project with a classifier; returns its folder, the classifier and the encoder it is said to have begun from."""
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "data").mkdir()
    (folder / "data/shards").symlink_to(small_shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own, start = network(smoke, 1), network(smoke, 2).encoder
        sections = {name: dataclasses.asdict(getattr(smoke, name)) for name in ("model", "views", "pretrain")}
        tuned = classifier.Tuned(own.encoder, {name: each.data for name, each in own.head.items()}, 0.02, 7)
        classifier.write(tuned, start, {**sections, "data": "d1"}, smoke)
    return folder, own, start


@pytest.fixture
def written(made, monkeypatch):
    folder, own, start = made
    monkeypatch.chdir(folder)
    return own, start


def test_embedding_and_logits_equal_torchs_at_any_size(written, smoke):
    """By way of torchvision's own resize and normalisation, one image at a time."""
    own, _ = written
    views = smoke.views
    preprocess = v2.Compose(
        [
            v2.Resize((views.size, views.size), v2.InterpolationMode.BILINEAR, antialias=True),
            v2.Normalize(255 * np.array(views.mean), 255 * np.array(views.std)),
        ]
    )
    pixels = [np.random.default_rng(i).integers(0, 256, (20 + i, 31, 3), dtype=np.uint8) for i in range(5)]
    rows = torch.cat([own.encoder.backbone(preprocess(torch.tensor(p).permute(2, 0, 1).float())[None]) for p in pixels])
    logits = rows @ own.head["weight"].T + own.head["bias"]
    encoder = Encoder(files.CLASSIFIER)
    np.testing.assert_allclose(encoder.embed(pixels), rows.numpy(), atol=1e-4)
    np.testing.assert_allclose(encoder.classify(pixels), logits.numpy(), rtol=1e-4, atol=1e-3)


def test_what_the_file_says_of_itself(written):
    own, start = written
    encoder = Encoder(files.CLASSIFIER)
    assert encoder.kind == "classifier"
    assert encoder.classes == webdataset.classes()
    assert encoder.metadata["data_hash"] == "d1"
    assert encoder.metadata["labels_hash"] == webdataset.digest(webdataset.tars("train"))
    assert encoder.metadata["space"] == onnx_file.embedding_space(own.encoder)
    assert encoder.metadata["pretrained_space"] == onnx_file.embedding_space(start) != encoder.metadata["space"]


def test_figures_are_those_of_the_file_and_of_the_stage_evaluate(written, smoke):
    _, start = written
    measured = classifier.read()
    assert measured.sha256 == files.sha256(files.CLASSIFIER)
    assert (measured.images, measured.classes) == (Images(60, 30, 60), 4)
    assert (measured.steps, measured.lr, measured.refitted) == (7, 0.02, False)
    right = {}
    for split in ("val", "test"):
        labels = np.array([sample.label for sample in webdataset.read(webdataset.tars(split))])
        right[split] = Encoder(files.CLASSIFIER).classify(pictures(split)).argmax(1) == labels
        assert getattr(measured.classifier, split).top1 == pytest.approx(100 * right[split].mean())
    cpu, names = torch.device("cpu"), ("train", "val", "test")
    splits = {name: features.embed(start, features.labelled(name), cpu) for name in names}
    result = evaluate.score(splits, 4, smoke.evaluate, "pretrained")
    assert dataclasses.astuple(measured.linear.test) == pytest.approx(dataclasses.astuple(result.scores.linear))
    assert measured.difference == intervals.gain(
        torch.from_numpy(right["test"]), result.predictions["linear"] == splits["test"].labels
    )
    assert measured.difference.points == pytest.approx(measured.classifier.test.top1 - measured.linear.test.top1)
    assert measured.parity.cosine_min > 0.999999


def test_val_chooses_between_the_trained_head_and_one_fitted_again(written, smoke):
    own, _ = written
    cpu, good = torch.device("cpu"), {name: value.data for name, value in own.head.items()}
    train, val = (features.embed(own.encoder, features.labelled(name), cpu) for name in ("train", "val"))
    head, refitted = classifier.best_head(good, train, val, 4, smoke)
    assert head is good
    assert not refitted
    bad = {"weight": good["weight"][[1, 2, 3, 0]], "bias": good["bias"]}
    head, refitted = classifier.best_head(bad, train, val, 4, smoke)
    assert refitted
    assert torch.equal(head["weight"], good["weight"])


@pytest.mark.parametrize(
    ("low", "text"), [(0.1, "beats the linear probe by +2.0 points"), (0.0, "is not better than the linear probe")]
)
def test_it_says_plainly_which_is_the_better_choice(written, low, text):
    measured = dataclasses.replace(classifier.read(), difference=figures.Gain(2.0, low, 5.0))
    told = classifier.words(measured)
    assert text in told
    assert ("Prefer models/encoder.onnx" in told) == (low == 0)


def test_it_is_indexed_in_a_space_of_its_own_and_served(written):
    index.run(model=files.CLASSIFIER)
    encoder = Encoder(files.CLASSIFIER)
    assert [path.stem for path in files.INDEX.glob("*.npz")] == [encoder.metadata["space"]]
    picture = pictures("test")[0]
    wanted = softmax(encoder.classify([picture]))[0]
    with (
        hosting(app(files.CLASSIFIER, files.INDEX, Flags(), None)) as port,
        client(f"http://127.0.0.1:{port}") as asked,
    ):
        [classified] = asked.post("/v1/classify?top=1", files=files_of(encoded(picture))).json()["results"]
        [searched] = asked.post("/v1/search?k=3", files=files_of(encoded(picture))).json()["results"]
    [best] = classified["probabilities"]
    assert (best["class"], best["probability"]) == (
        encoder.classes[wanted.argmax()],
        pytest.approx(wanted.max(), abs=1e-4),
    )
    assert len(searched["neighbours"]) == 3


def test_a_file_that_is_missing_names_its_command(project):
    with pytest.raises(Exception, match=r"models/classifier\.onnx is missing; run `barlow finetune --all-labels`"):
        Encoder(files.CLASSIFIER)


def test_the_metrics_are_nested_json(written):
    document = json.loads(files.CLASSIFYING.read_text())
    assert set(document["classifier"]["test"]) == {"top1", "low", "high"}
    assert figures.build(classifier.Classifying, document, "file") == classifier.read()
