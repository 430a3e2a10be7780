import dataclasses
import json
import os
from pathlib import Path

import pytest
import yaml

os.environ.update(DVC_NO_ANALYTICS="1", DO_NOT_TRACK="1")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def smoke():
    """The params of the `smoke` preset."""
    from barlow import params, preset

    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    list(preset.merge(document, yaml.safe_load((ROOT / "presets/smoke.yaml").read_text()), ""))
    return params.build(params.Params, document, "smoke")


@pytest.fixture
def change():
    """`change(params, "pretrain", epochs=1)` returns params with other values in a section."""

    def change(params, section, **values):
        return dataclasses.replace(params, **{section: dataclasses.replace(getattr(params, section), **values)})

    return change


@pytest.fixture
def mean_onnx():
    """`mean_onnx(path, classes)` writes an encoder made without torch: mean red, green, blue; logits are twice that."""

    def write(path, classes=()):
        import onnx
        from onnx import TensorProto, helper

        outputs = ["embedding", "logits"][: 1 + bool(classes)]
        graph = helper.make_graph(
            [
                helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
                helper.make_node("ReduceMean", ["pixels", "axes"], ["embedding"], keepdims=0),
                helper.make_node("Add", ["embedding", "embedding"], ["logits"]),
            ][: 2 + bool(classes)],
            "mean",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "height", "width", 3])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in outputs],
            [helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        helper.set_model_props(model, {"version": "1", "space": "mean", "classes": json.dumps(list(classes))})
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)
        return path

    return write


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory, smoke):
    """A data/shards folder of 200 surfaces to pretrain on and 60, 30, 60 labelled ones."""
    import io

    import numpy as np
    from PIL import Image

    from barlow import files, shards, synthetic

    folder = tmp_path_factory.mktemp("small") / "shards"
    classes = list(synthetic.FAMILIES)[:4]

    def sample(split, i):
        rng = np.random.default_rng([len(split), i])
        buffer = io.BytesIO()
        Image.fromarray(synthetic.surface(classes[i % 4], 28, rng)).save(buffer, "JPEG")
        return shards.Sample(f"{split}{i:04d}", buffer.getvalue(), "jpg", -1 if split == "pretrain" else i % 4)

    for split, count in {"pretrain": 200, "train": 60, "val": 30, "test": 60}.items():
        shards.write(folder / f"{split}-000000.tar", (sample(split, i) for i in range(count)))
    files.write_json(folder / shards.CLASSES, classes)
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, small_shards):
    """An empty project to run stages in, with `small_shards` as its data/shards."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shards").symlink_to(small_shards)
    monkeypatch.chdir(tmp_path)
    return tmp_path
