import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional

from barlow.core import files, images, webdataset
from barlow.core.errors import UserError
from barlow.core.weights import save_weights
from barlow.evaluation import features
from barlow.training import model

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
    train = list(webdataset.read(webdataset.tars("train")))[:5]
    sizes = [(30, 20), (50, 60), (8, 9), (24, 24), (100, 10)]
    mixed = [resized(sample, size) for sample, size in zip(train, sizes, strict=True)]
    webdataset.write(project / "mixed.tar", mixed)
    split = features.embed(encoder, webdataset.read([project / "mixed.tar"]), CPU)
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
        samples = webdataset.read(webdataset.tars(name, small_shards))
        webdataset.write(folder / f"{name}-000000.tar", (s._replace(label=-1) if name == split else s for s in samples))
    files.write_json(folder / webdataset.CLASSES_FILE, webdataset.classes(small_shards))
    assert features.knn_on_val(encoder, CPU) == {}


def test_knn_on_val_without_the_splits(encoder, project):
    (project / "data/shards").unlink()
    assert features.knn_on_val(encoder, CPU) == {}


WORKER = """
import json, os, sys
import torch
import torch.distributed as dist
from barlow.training import distributed, model
from barlow.evaluation import features
from barlow.core import images

decode, decoded = images.decode, []
images.decode = lambda data: decoded.append(1) or decode(data)

def work(rank):
    os.environ["RANK"] = str(rank)
    distributed.start("cpu")
    found = []
    for folder in sys.argv[1:]:
        os.chdir(folder)
        decoded.clear()
        accuracy = features.knn_on_val(model.load_encoder()[0], torch.device("cpu"))
        found.append([accuracy, len(decoded)])
    for n in (5, 4, 1):
        rows = torch.arange(2 * n).reshape(n, 2)
        assert torch.equal(features.gathered(rows[rank::2], n), rows)
    everyone = [None, None]
    dist.all_gather_object(everyone, found)
    if rank == 0:
        print(json.dumps(everyone))
    distributed.stop()

torch.set_num_threads(1)
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), WORLD_SIZE="2")
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
torch.multiprocessing.start_processes(work, nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_two_processes_share_the_images_and_find_what_one_does(encoder, smoke, small_shards, tmp_path, monkeypatch):
    """As many images for each; not as many, beside images without a label; for one process none; no labels."""
    identity = {"model": dataclasses.asdict(smoke.model), "views": dataclasses.asdict(smoke.views)}
    expected, folders = [], []
    for train, val in ((60, 30), (57, 29), (60, 1), (60, 0)):
        folders.append(tmp_path / f"{train} {val}")
        folders[-1].mkdir()
        monkeypatch.chdir(folders[-1])
        for split, n in {"train": train, "val": val}.items():
            samples = enumerate(webdataset.read(webdataset.tars(split, small_shards)))
            labelled = (sample._replace(label=sample.label if i < n else -1) for i, sample in samples)
            webdataset.write(files.SHARDS / f"{split}-000000.tar", labelled)
        files.write_json(files.SHARDS / webdataset.CLASSES_FILE, webdataset.classes(small_shards))
        save_weights(files.ENCODER, encoder.state_dict(), identity)
        expected.append(features.knn_on_val(encoder, CPU))
    assert [len(accuracy) for accuracy in expected] == [1, 1, 1, 0]
    command = [sys.executable, "-c", WORKER, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads(done.stdout)
    assert [accuracy for accuracy, _ in first] == [accuracy for accuracy, _ in second] == expected
    assert [decoded for _, decoded in first] == [30 + 15, 29 + 15, 30 + 1, 30]
    assert [decoded for _, decoded in second] == [30 + 15, 28 + 14, 30, 30]


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
