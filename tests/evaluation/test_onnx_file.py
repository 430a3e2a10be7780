import dataclasses

import numpy as np
import pytest
import torch

from barlow.core import files, images, webdataset
from barlow.evaluation import onnx_file
from barlow.training import model


def sample(number, width):
    pixels = np.full((30, width, 3), number, np.uint8)
    return webdataset.Sample(f"{number:024x}", images.jpeg(pixels), "jpg", 0, 30, width)


def test_pictures_are_the_val_splits_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    webdataset.write(files.SHARDS / "pretrain-000000.tar", [sample(0, 31), sample(1, 32)])
    webdataset.write(files.SHARDS / "val-000000.tar", [sample(2, 33)])
    assert [picture.shape[1] for picture in onnx_file._pictures(2)] == [33, 31]


def test_cosine_of_dead_rows():
    dead, alive = np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)
    assert onnx_file._cosine(dead, dead) == [1]
    assert onnx_file._cosine(dead, alive) == [0]
    assert onnx_file._cosine(alive, -2 * alive) == pytest.approx([-1])


def test_embedding_space_differs_with_whatever_changes_embeddings(smoke):
    def space(seed=0, **views):
        torch.manual_seed(seed)
        return onnx_file.embedding_space(model.FrozenEncoder(smoke.model, dataclasses.replace(smoke.views, **views)))

    assert space() == space(flip=0.1)  # training only
    spaces = {space(), space(seed=1), space(size=32), space(mean=(0.5, 0.5, 0.5)), space(std=(0.5, 0.5, 0.5))}
    assert len(spaces) == 5
