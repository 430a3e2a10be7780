import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from barlow.core import files, webdataset
from barlow.core.images import decode
from barlow.encoder import quantize
from barlow.encoder.encoder import Encoder
from barlow.evaluation import exported, reduced

SIDE, WIDTH = 20, 16  # px of the network's input; channels
METADATA = {"version": "1", "space": "s", "image_size": str(SIDE), "dim": str(WIDTH), "data_hash": "d", "note": "é"}
NAMES = ("int8", "fp16")


def write_encoder(path, head=None, classes=("a", "b", "c", "d")):
    """A small residual network like an exported encoder: preprocessing inside, and logits if there is a `head`."""
    rng = np.random.default_rng(1)

    def filters(outputs, inputs):
        values = rng.normal(size=(outputs, inputs, 3, 3))
        values *= rng.uniform(0.2, 3, (outputs, 1, 1, 1))  # one range per channel
        return (values / np.sqrt(9 * inputs)).astype(np.float32)

    weights = {
        "mean": np.full((1, 3, 1, 1), 120, np.float32),
        "deviation": np.full((1, 3, 1, 1), 60, np.float32),
        "side": np.array([SIDE, SIDE]),
        "w1": filters(WIDTH, 3),
        "b1": rng.normal(size=WIDTH).astype(np.float32),
        "w2": filters(WIDTH, WIDTH),
        "b2": rng.normal(size=WIDTH).astype(np.float32),
    }
    pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], "planes", perm=[0, 3, 1, 2]),
        helper.make_node("Shape", ["planes"], ["shape"], "shape", start=0, end=2),
        helper.make_node("Concat", ["shape", "side"], ["sizes"], "sizes", axis=0),
        helper.make_node("Resize", ["planes", "", "", "sizes"], ["small"], "resize", mode="linear"),
        helper.make_node("Sub", ["small", "mean"], ["centred"], "centre"),
        helper.make_node("Div", ["centred", "deviation"], ["x0"], "scale"),
        helper.make_node("Conv", ["x0", "w1", "b1"], ["x1"], "conv1", **pads),
        helper.make_node("Relu", ["x1"], ["x2"], "relu1"),
        helper.make_node("MaxPool", ["x2"], ["x3"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["x3", "w2", "b2"], ["x4"], "conv2", **pads),
        helper.make_node("Add", ["x3", "x4"], ["x5"], "add"),
        helper.make_node("Relu", ["x5"], ["x6"], "relu2"),
        helper.make_node("ReduceMean", ["x6", "axes"], ["embedding"], "mean", keepdims=0),
    ]
    weights["axes"] = np.array([2, 3])
    shapes = {"embedding": WIDTH}
    if head:
        weights |= {"head": head[0], "bias": head[1]}
        nodes.append(helper.make_node("Gemm", ["embedding", "head", "bias"], ["logits"], "head", transB=1))
        shapes["logits"] = len(classes)
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in shapes.items()],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, METADATA | {"classes": json.dumps(list(classes if head else []))})
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path, pictures):
    """All outputs for uint8 images of any sizes, one image at a time."""
    reader = session(path)
    return [
        np.concatenate(rows) for rows in zip(*(reader.run(None, {"images": p[None]}) for p in pictures), strict=True)
    ]


def pictures(split):
    samples = list(webdataset.read(webdataset.tars(split)))
    return [decode(sample.data) for sample in samples], np.array([sample.label for sample in samples])


@pytest.fixture(scope="module")
def made(small_shards, smoke, tmp_path_factory):
    """A project with an encoder, its head and its reduced encoders, made once; returns the project and the figures."""
    home, folder = Path.cwd(), tmp_path_factory.mktemp("reduced")
    (folder / "data").mkdir()
    (folder / "data/shards").symlink_to(small_shards)
    os.chdir(folder)
    try:
        write_encoder(files.ONNX)
        images, labels = pictures("train")
        probe = LogisticRegression(C=100, max_iter=2000).fit(run(files.ONNX, images)[0], labels)
        head = probe.coef_.astype(np.float32), probe.intercept_.astype(np.float32)
        write_encoder(files.ONNX, head)
        figures = reduce(files.REDUCED, smoke, 20, 10)
    finally:
        os.chdir(home)
    return folder, figures


@pytest.fixture
def figures(made, monkeypatch):
    monkeypatch.chdir(made[0])
    return made[1]


def reduce(folder, smoke, max_accuracy_loss, images=5):
    p = dataclasses.replace(smoke.export, max_accuracy_loss=max_accuracy_loss, calibration_images=images)
    return reduced.reduce(Encoder(files.ONNX), files.ONNX, folder, p, smoke.evaluate)


def test_both_are_written_with_their_sizes(figures):
    assert sorted(path.name for path in files.REDUCED.iterdir()) == ["fp16.onnx", "int8.onnx"]
    for name in NAMES:
        assert figures[name].written is True
        assert figures[name].bytes == (files.REDUCED / f"{name}.onnx").stat().st_size
    assert set(figures) == {"float32", *NAMES}
    json.dumps({name: dataclasses.asdict(each) for name, each in figures.items()}, allow_nan=False)


@pytest.mark.parametrize("name", ["float32", *NAMES])
def test_accuracies_are_those_of_scikit_learn(figures, smoke, name):
    path = files.ONNX if name == "float32" else files.REDUCED / f"{name}.onnx"
    (train, train_labels), (test, labels) = pictures("train"), pictures("test")
    embeddings, logits = run(path, test)
    p = smoke.evaluate
    nearest = KNeighborsClassifier(
        p.knn_k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / p.knn_temperature)
    ).fit(run(path, train)[0].astype(np.float64), train_labels)
    assert figures[name].top1.linear == pytest.approx(100 * np.mean(logits.argmax(1) == labels))
    assert figures[name].top1.knn == pytest.approx(100 * nearest.score(embeddings.astype(np.float64), labels), abs=1e-6)
    assert 30 < figures[name].top1.linear < 100  # neither chance nor certainty: another reading would differ


def test_int8_convolutions_are_quantised_a_channel(figures):
    graph = onnx.load(files.REDUCED / "int8.onnx").graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    source = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(files.ONNX).graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 2
    for node, name in zip(convolutions, ("w1", "w2"), strict=True):
        activation, weight, bias = (maker[value] for value in node.input)
        assert {activation.op_type, weight.op_type, bias.op_type} == {"DequantizeLinear"}
        assert maker[activation.input[0]].op_type == "QuantizeLinear"
        assert values[activation.input[2]].dtype == np.uint8
        quantised, scale, zero = (values[value] for value in weight.input)
        assert (quantised.dtype, values[bias.input[0]].dtype) == (np.int8, np.int32)
        assert scale.shape == zero.shape == (WIDTH,)
        assert next(a.i for a in weight.attribute if a.name == "axis") == 0
        assert not zero.any()
        np.testing.assert_allclose(scale, np.abs(source[name]).max((1, 2, 3)) / 127, rtol=0.01)  # symmetric
        restored = quantised * scale[:, None, None, None]
        assert (np.abs(restored - source[name]) <= 0.51 * scale[:, None, None, None]).all()


def ranges(path):
    """Scale and zero point of the input of the first convolution."""
    graph = onnx.load(path).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    node = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    return float(values[node.input[1]]), int(values[node.input[2]])


def wanted_ranges(images, tmp_path):
    model = onnx.load(files.ONNX)
    model.graph.output.append(helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE]))
    onnx.save(model, tmp_path / "seen.onnx")
    seen = run(tmp_path / "seen.onnx", images)[-1]
    low, high = min(seen.min(), 0), max(seen.max(), 0)
    return (high - low) / 255, round(-low / (high - low) * 255)


@pytest.mark.parametrize(("count", "among"), [(1, 1), (5, 5), (1000, 30 + 60 + 200)])
def test_ranges_come_from_the_first_val_images(figures, tmp_path, count, among):
    quantize.int8(files.ONNX, tmp_path / "int8.onnx", count)
    held_out = [image for split in ("val", "train", "pretrain") for image in pictures(split)[0]][:among]
    scale, zero = wanted_ranges(held_out, tmp_path)
    assert ranges(tmp_path / "int8.onnx") == (pytest.approx(scale, rel=1e-5), pytest.approx(zero, abs=1))
    if count == 1:
        assert scale != pytest.approx(wanted_ranges(pictures("val")[0], tmp_path)[0], rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_gives_the_same_bytes(figures, smoke, tmp_path, name):
    make = {"int8": quantize.int8, "fp16": quantize.fp16}[name]
    make(files.ONNX, tmp_path / "again.onnx", 10)
    assert (tmp_path / "again.onnx").read_bytes() == (files.REDUCED / f"{name}.onnx").read_bytes()


@pytest.mark.parametrize(("name", "least"), [("int8", 0.99), ("fp16", 0.99999)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 28, 28), (3, 7, 90), (7, 200, 131)])
def test_embeddings_are_close_at_any_shape(figures, name, least, shape):
    batch = np.random.default_rng(0).integers(60, 196, (*shape, 3), dtype=np.uint8)
    full = session(files.ONNX).run(["embedding"], {"images": batch})[0].astype(np.float64)
    reduced = session(files.REDUCED / f"{name}.onnx").run(["embedding"], {"images": batch})[0]
    assert reduced.shape == (len(batch), WIDTH)
    cosines = (full * reduced).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(reduced, axis=1)
    assert cosines.min() > least
    assert (reduced != full).any()  # it is another network


@pytest.mark.parametrize("name", NAMES)
def test_all_but_precision_and_space_stays(figures, name):
    before, after = session(files.ONNX), session(files.REDUCED / f"{name}.onnx")
    for side in ("get_inputs", "get_outputs"):
        described = [[(v.name, v.type, v.shape) for v in getattr(reader, side)()] for reader in (before, after)]
        assert described[0] == described[1]
    metadata = before.get_modelmeta().custom_metadata_map
    changed = {"precision": name, "space": f"s-{name}"}
    assert after.get_modelmeta().custom_metadata_map == metadata | changed
    assert onnx.load(files.REDUCED / f"{name}.onnx").opset_import[0].version == 18


def test_fp16_weights_are_half_as_large(figures):
    types = {tensor.name: tensor.data_type for tensor in onnx.load(files.REDUCED / "fp16.onnx").graph.initializer}
    assert types["w1"] == types["w2"] == types["head"] == TensorProto.FLOAT16
    assert types["mean"] == types["deviation"] == TensorProto.FLOAT  # of the preprocessing, as it was


def other_head(change):
    def make(source, target, _):
        model = onnx.load(source)
        for tensor in model.graph.initializer:
            if tensor.name in ("head", "bias"):
                tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))
        onnx.save(model, target)

    return make


def dead(source, target, _):
    """No filter reacts any more, but a bias keeps the logits: only kNN gets worse."""
    model = onnx.load(source)
    for node in model.graph.node:
        if node.op_type == "ReduceMean":
            node.output[0] = "alive"
        if node.op_type == "Gemm":
            node.input[0] = "alive"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    model.graph.node.append(helper.make_node("Mul", ["alive", "nothing"], ["embedding"]))
    onnx.save(model, target)


@pytest.mark.parametrize(
    ("make", "spoilt", "kept"),
    [(other_head(np.negative), "linear", "knn"), (dead, "knn", "linear")],
    ids=["linear probe", "kNN"],
)
def test_one_that_loses_too_much_is_not_written(figures, smoke, tmp_path, monkeypatch, capsys, make, spoilt, kept):
    (tmp_path / "int8.onnx").write_text("of before")
    monkeypatch.setattr(quantize, "int8", make)
    found = reduce(tmp_path, smoke, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["fp16.onnx"]
    assert (found["int8"].written, found["fp16"].written) == (False, True)
    full, int8 = found["float32"].top1, found["int8"].top1
    assert getattr(int8, kept) == getattr(full, kept)
    lost = getattr(full, spoilt) - getattr(int8, spoilt)
    assert lost > 10
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"{tmp_path}/int8.onnx is not written: it loses {lost:.2f} points, export.max_accuracy_loss=10; it keeps "
    )
    assert re.fullmatch(rf"{tmp_path}/fp16.onnx: it loses -?[\d.]+ points, .*; it keeps [\d.]+ % of the .*", second)


def test_the_loss_that_is_allowed_is_allowed(figures, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "int8", other_head(np.negative))
    worse = reduce(tmp_path, smoke, 100)
    full, int8 = worse["float32"].top1, worse["int8"].top1
    lost = max(full.linear - int8.linear, full.knn - int8.knn)
    assert worse["int8"].written
    for bound, written in ((lost - 1e-9, False), (lost, True)):
        found = reduce(tmp_path, smoke, bound)
        assert found["int8"].written is written
        assert (tmp_path / "int8.onnx").exists() is written


def test_images_without_a_label_do_not_count(figures, smoke, tmp_path, monkeypatch):
    encoder = Encoder(files.ONNX)
    samples = {split: list(webdataset.read(webdataset.tars(split))) for split in ("pretrain", "train", "test")}
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        mixed = [*samples["pretrain"][:20], *samples[split], *samples["pretrain"][20:40]]
        webdataset.write(files.SHARDS / f"{split}-000000.tar", mixed)
    wanted = dataclasses.astuple(figures["float32"].top1)
    assert dataclasses.astuple(exported.accuracy(encoder, smoke.evaluate)) == pytest.approx(wanted)
    webdataset.write(files.SHARDS / "train-000000.tar", samples["pretrain"])
    assert exported.accuracy(encoder, smoke.evaluate) is None  # kNN has nothing to learn from
