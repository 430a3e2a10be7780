from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from sklearn.neighbors import NearestNeighbors

from barlow.core import files, webdataset
from barlow.core.images import decode
from barlow.encoder import quantize
from barlow.encoder.encoder import Encoder
from barlow.evaluation import exported, reduced
from barlow.evaluation.figures import Top1


@pytest.fixture
def project(small_shards, tmp_path, monkeypatch, write_encoder):
    """A project without labels and without a head, with an encoder of 12 numbers per image."""
    monkeypatch.chdir(tmp_path)
    for split in ("pretrain", "val", "test"):
        samples = [s._replace(label=-1) for s in webdataset.read(webdataset.tars(split, small_shards))]
        webdataset.write(files.SHARDS / f"{split}-000000.tar", samples)
    write_encoder("edges", [])


def noisy(amount):
    """Return what makes a reduced encoder whose filters are off by a share of their size."""

    def make(source, target, _):
        model = onnx.load(source)
        for tensor in model.graph.initializer:
            if tensor.name == "filters":
                values = numpy_helper.to_array(tensor)
                noise = np.random.default_rng(0).normal(size=values.shape) * values.std()
                tensor.CopyFrom(numpy_helper.from_array((values + amount * noise).astype(np.float32), tensor.name))
        onnx.save(model, target)

    return make


def kept_by_scikit_learn(path, k):
    """The mean share of neighbours in common with the float32 file, over val and pretrain."""
    samples = [s for split in ("val", "pretrain") for s in webdataset.read(webdataset.tars(split))]
    pictures = [decode(sample.data) for sample in samples]
    sets = []
    for each in (files.ONNX, path):
        x = Encoder(each).embed(pictures).astype(np.float64)
        found = NearestNeighbors(n_neighbors=k, metric="cosine").fit(x).kneighbors(return_distance=False)
        sets.append([set(row) for row in found])
    return 100 * np.mean([len(a & b) / k for a, b in zip(*sets, strict=True)])


def run(p, monkeypatch, amount, **values):
    """Reduce with both makers replaced: int8 by one that is off by `amount`, fp16 by one that is exact."""
    monkeypatch.setattr(quantize, "int8", noisy(amount))
    monkeypatch.setattr(quantize, "fp16", noisy(0))
    export = replace(p.export, **values)
    return reduced.reduce(Encoder(), files.ONNX, files.REDUCED, export, p.evaluate)


def test_without_labels_the_neighbours_that_are_kept_decide(project, smoke, monkeypatch, capsys):
    found = run(smoke, monkeypatch, 0.3, min_neighbours=0)
    assert found["int8"].written
    assert found["int8"].top1 is found["float32"].top1 is None
    kept = kept_by_scikit_learn(files.REDUCED / "int8.onnx", smoke.evaluate.knn_k)
    assert found["int8"].neighbours == pytest.approx(kept, abs=0.1)  # ties apart
    assert 10 < kept < 95
    assert found["float32"].neighbours == found["fp16"].neighbours == 100
    assert found["int8"].bytes == (files.REDUCED / "int8.onnx").stat().st_size
    kept = found["int8"].neighbours
    capsys.readouterr()
    for bound, written in ((kept, True), (kept + 1e-6, False)):
        found = run(smoke, monkeypatch, 0.3, min_neighbours=bound)
        assert (found["int8"].written, found["fp16"].written) == (written, True)
        assert (files.REDUCED / "int8.onnx").exists() is written  # the old one is removed
    said = capsys.readouterr().out.splitlines()
    end = f"export.min_neighbours={kept:g}; there are no labels"
    assert said[0] == f"models/reduced/int8.onnx: it keeps {kept:.1f} % of the nearest neighbours, {end}"
    assert said[2].startswith("models/reduced/int8.onnx is not written: it keeps ")


def test_an_encoder_is_loaded_once_and_embeds_the_images_once(project, smoke, monkeypatch):
    loaded, embedded, compared = [], [], exported.compared
    monkeypatch.setattr(reduced, "Encoder", lambda path: loaded.append(path.name) or Encoder(path))
    monkeypatch.setattr(exported, "compared", lambda encoder: embedded.append(encoder) or compared(encoder))
    run(smoke, monkeypatch, 0)
    assert loaded == ["int8.onnx", "fp16.onnx"]
    assert len(embedded) == 3


def test_the_images_are_vals_first_then_pretrains(project, monkeypatch):
    monkeypatch.setattr(exported, "COMPARED_IMAGES", 70)
    samples = [s for split in ("val", "pretrain") for s in webdataset.read(webdataset.tars(split))][:70]
    assert len(list(webdataset.read(webdataset.tars("val")))) < 70
    found = exported.compared(Encoder()).numpy()
    np.testing.assert_allclose(found, Encoder().embed(decode(s.data) for s in samples), atol=1e-5)


def judged(smoke, full, reduced_, kept):
    p = replace(smoke.export, max_accuracy_loss=0.5, min_neighbours=80.0)
    return reduced.judge(full, reduced_, kept, p)


@pytest.mark.parametrize(
    ("linear", "knn", "kept", "fine"),
    [(80.0, 70.0, 10.0, True), (79.5, 69.5, None, True), (79.4, 90.0, 100.0, False), (90.0, 69.4, 100.0, False)],
)
def test_with_labels_accuracy_alone_decides(smoke, linear, knn, kept, fine):
    assert judged(smoke, Top1(80.0, 70.0), Top1(linear, knn), kept)[0] is fine


@pytest.mark.parametrize(("kept", "fine"), [(80.0, True), (79.99, False), (0.0, False), (None, False)])
def test_without_labels_neighbours_decide(smoke, kept, fine):
    assert judged(smoke, None, None, kept)[0] is fine


def test_one_image_is_not_enough_to_judge(smoke):
    assert judged(smoke, None, None, None)[1] == "there are neither labels nor two images to measure it with"
