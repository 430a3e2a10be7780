import numpy as np
import pytest
import torch

from barlow.core import files, images, webdataset
from barlow.core.errors import GateError
from barlow.encoder.encoder import Encoder
from barlow.evaluation import exported


@pytest.fixture
def project(tmp_path, monkeypatch, small_shards):
    monkeypatch.chdir(tmp_path)
    files.SHARDS.parent.mkdir()
    files.SHARDS.symlink_to(small_shards)


def test_embeddings_have_the_keys_and_labels_of_their_images(project, mean_onnx):
    encoder = Encoder(mean_onnx(files.ONNX))
    samples = list(webdataset.read(webdataset.tars("val")))
    split = exported.embed(encoder, iter(samples))
    assert split.keys == [sample.key for sample in samples]
    assert split.labels.tolist() == [sample.label for sample in samples]
    means = [images.decode(sample.data).reshape(-1, 3).mean(0) for sample in samples]
    assert torch.allclose(split.features, torch.tensor(np.array(means)).float(), atol=1e-3)


def test_an_embedding_that_is_not_finite_is_refused_by_its_image(project, mean_onnx, monkeypatch):
    encoder = Encoder(mean_onnx(files.ONNX))
    samples = list(webdataset.read(webdataset.tars("val")))
    run = encoder.run

    def third_is_nan(pixels):
        for embeddings, logits in run(pixels):
            embeddings[2] = np.nan
            yield embeddings, logits

    monkeypatch.setattr(encoder, "run", third_is_nan)
    with pytest.raises(GateError, match=f"the embedding of image {samples[2].key} has a NaN or an infinity"):
        exported.embed(encoder, iter(samples))


def test_without_a_head_there_is_no_accuracy(project, mean_onnx, smoke):
    assert exported.accuracy(Encoder(mean_onnx(files.ONNX)), smoke.evaluate) is None
