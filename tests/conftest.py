import dataclasses
import fcntl
import gc
import json
import os
from pathlib import Path

import pytest
import yaml
from jaxtyping import install_import_hook

install_import_hook(
    ["barlow.training.loss", "barlow.evaluation.probe"], "beartype.beartype"
)  # shapes in annotations are checked, in tests

os.environ.update(DVC_NO_ANALYTICS="1", DO_NOT_TRACK="1", OMP_WAIT_POLICY="PASSIVE")  # the last as `cli` sets it
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is another process for the other core
ROOT = Path(__file__).parent.parent


def pytest_collection_finish():
    """What was imported stays: without it in the collector's way, the `gc.collect()` of a test takes no time."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


LONG = ["test_flows.py", "test_pipeline.py", "test_pretrain.py", "test_remote.py"]


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that the processes end together; the first mostly waits."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def smoke():
    """The params of the `smoke` preset."""
    from barlow.settings import editing, params, strict

    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    list(editing.merge(document, yaml.safe_load((ROOT / "presets/smoke.yaml").read_text())))
    return strict.build(params.Params, document, "smoke")


@pytest.fixture(scope="module")
def one_thread():
    """Let torch compute on one thread: small networks are the faster for it, and more so beside DALI's threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def change():
    """`change(params, "pretrain", epochs=1)` returns params with other values in a section."""

    def change(params, section, **values):
        return dataclasses.replace(params, **{section: dataclasses.replace(getattr(params, section), **values)})

    return change


@pytest.fixture
def plain(smoke):
    """`plain(flip=1.0)` returns view settings that change nothing but what is given."""
    nothing = {
        "crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "brightness": 0.0,
        "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0), "blur_sigma": (1.0, 1.0),
        "solarize": (0.0, 0.0), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "size": 8,
    }  # fmt: skip
    return lambda **values: dataclasses.replace(smoke.views, **nothing | values)


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

    from barlow.core import files, webdataset
    from barlow.data import synthetic

    folder = tmp_path_factory.mktemp("small") / "shards"
    classes = list(synthetic.FAMILIES)[:4]

    def sample(split, i):
        rng = np.random.default_rng([len(split), i])
        buffer = io.BytesIO()
        Image.fromarray(synthetic.surface(classes[i % 4], 28, rng)).save(buffer, "JPEG")
        label = -1 if split == "pretrain" else i % 4
        return webdataset.Sample(f"{split}{i:04d}", buffer.getvalue(), "jpg", label, height=28, width=28)

    for split, count in {"pretrain": 200, "train": 60, "val": 30, "test": 60}.items():
        webdataset.write(folder / f"{split}-000000.tar", (sample(split, i) for i in range(count)))
    files.write_json(folder / webdataset.CLASSES_FILE, classes)
    return folder


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory):
    """A clone of this project with the smoke preset in which every stage has run; no test may change it."""
    from clones import clone, ran, run

    from barlow.cli import STAGES

    # The base of the whole run, if there are several test processes: the first that asks makes it for all.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "reproduced"
    folder.mkdir(exist_ok=True)
    project, done = folder / "barlow", folder / "done"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            assert not project.exists(), "it failed in another test process"
            clone(project)
            run(project, "barlow", "scan")
            assert ran(run(project, "dvc", "repro")) == list(STAGES)
            done.touch()
    return project


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window; tests that want it are marked `browsers.needed`."""
    from browsers import CHROMIUM
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def project(tmp_path, monkeypatch, small_shards):
    """An empty project to run stages in, with `small_shards` as its data/shards."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shards").symlink_to(small_shards)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nasty(tmp_path):
    """A folder of every kind of trouble; returns it and, by path, why a file is refused (None: it is fine)."""
    import io
    import struct
    import zlib

    import numpy as np
    from PIL import Image

    folder, refused = tmp_path / "a folder, ünïcödé", {}
    rng = np.random.default_rng(0)

    def write(name, content, why=None):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        refused[name] = why

    def image(mode, kind, size=(24, 20), **options):
        pixels = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        if mode == "I;16":
            pixels = Image.fromarray(rng.integers(0, 65536, (size[1], size[0]), dtype=np.uint16))
        buffer = io.BytesIO()
        pixels.convert(mode).save(buffer, kind, **options)
        return buffer.getvalue()

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    whole = image("RGB", "JPEG")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    write("写真 1.jpg", whole)
    write("a b/c d/e f/deep.jpg", image("RGB", "JPEG"))
    for name, mode, kind in [
        ("gray.png", "L", "PNG"),
        ("gray alpha.png", "LA", "PNG"),
        ("palette.png", "P", "PNG"),
        ("rgba.png", "RGBA", "PNG"),
        ("cmyk.jpg", "CMYK", "JPEG"),
        ("deep colour.png", "I;16", "PNG"),
        ("deep colour.tif", "I;16", "TIFF"),
        ("a.webp", "RGB", "WEBP"),
        ("a.bmp", "RGB", "BMP"),
        ("a.tiff", "RGB", "TIFF"),
        ("no ending", "RGB", "PNG"),
    ]:
        write(f"kinds/{name}", image(mode, kind))
    write("kinds/rotated.jpg", image("RGB", "JPEG", exif=rotated))
    write("bad/empty.jpg", b"", "empty file")
    write("bad/truncated.jpg", whole[:-200], "image file is truncated")
    write("bad/truncated.png", image("RGB", "PNG")[:-200], "truncated|broken")
    write("bad/text.jpg", b"I am a text.\n", "not an image in a known format")
    write("bad/a.gif", image("P", "GIF"), "format GIF: validate.formats")
    write("bad/thin.png", image("L", "PNG", (24, 2)), "height 2: validate.min_side=16")
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(2501 * 20_000), 1))
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")
    write("bad/huge.png", huge, "20000 x 20000 pixels, more than the 100000000 allowed")
    write("bad/copy of 写真.jpg", whole)
    refused["写真 1.jpg"] = "duplicate of bad/copy of 写真.jpg"
    (folder / "a b/loop").symlink_to(folder)
    (folder / "a b/self").symlink_to("self")
    refused["a b/self"] = "cannot be read"
    (folder / "kinds/dangling.png").symlink_to("nowhere.png")
    refused["kinds/dangling.png"] = "no such file"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/linked.png").write_bytes(image("RGB", "PNG"))
    (folder / "kinds/link").symlink_to(tmp_path / "elsewhere")
    refused["kinds/link/linked.png"] = None
    return folder, refused


@pytest.fixture
def encoders(project, smoke, change):
    """A project as `dvc repro` leaves it, with encoders made without torch.

    `encoders(name, classes)` writes models/encoder.onnx and what belongs to it: "edges" embeds an image as the
    logarithms of what 12 small filters find in it, "other" as twice that, "noise" as nothing that means anything,
    "constant" as 1s and "nan" as NaN; it returns the file's SHA-256. `encoders.params` are the settings.
    """

    def write(name, classes=("a", "b", "c", "d")):
        return _write_encoder(name, classes)

    write.params = change(smoke, "promote", margin=10.0, max_latency_ratio=1000.0)
    return write


@pytest.fixture(scope="session")
def write_encoder():
    """`write_encoder(name, classes)` is what `encoders` does, in the working directory, which has data/shards."""
    return _write_encoder


def _write_encoder(name, classes):
    import numpy as np
    import onnx
    import stages
    import torch
    from onnx import TensorProto, helper

    from barlow.core import files, webdataset
    from barlow.core.images import decode
    from barlow.data import validation
    from barlow.data.validation import Counts
    from barlow.encoder.encoder import Encoder
    from barlow.evaluation import features, figures

    operators = {
        "edges": [("Identity", ["means"])],
        "other": [("Add", ["means", "means"])],
        "noise": [("Mul", ["means", "large"]), ("Sin", ["x0"])],
        "constant": [("Sub", ["means", "means"]), ("Cos", ["x0"])],
        "nan": [("Sub", ["means", "means"]), ("Div", ["x0", "x0"])],
    }
    filters = np.random.default_rng(0).normal(size=(12, 3, 3, 3))
    filters -= filters.mean(axis=(2, 3), keepdims=True)
    accepted = Counts(290, {"pretrain": 200, "train": 0, "val": 30, "test": 60})
    validation.write(validation.Validation(294, accepted, Counts(4, {"decodable": 4}), {}))
    files.write_json(files.PRETRAINING, {"loss": 1.0})
    figures.write(files.EVALUATION, stages.measured(4, 60)[0])
    figures.write(files.EXPORTING, stages.exporting())
    files.ONNX.parent.mkdir(exist_ok=True)
    chain = operators[name]
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "filters"], ["edges"]),
        helper.make_node("Abs", ["edges"], ["strengths"]),
        helper.make_node("GlobalAveragePool", ["strengths"], ["pooled"]),
        helper.make_node("Log", ["pooled"], ["logs"]),
        helper.make_node("Flatten", ["logs"], ["flat"]),
        helper.make_node("Sub", ["flat", "middle"], ["means"]),
    ]
    for i, (operator, inputs) in enumerate(chain):
        output = "embedding" if i == len(chain) - 1 else f"x{i}"
        nodes.append(helper.make_node(operator, inputs, [output]))
    nodes.append(helper.make_node("Slice", ["embedding", "start", "end", "axis"], ["logits"]))
    graph = helper.make_graph(
        nodes[: len(nodes) - (not classes)],
        name,
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 12]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(classes)]),
        ][: 1 + bool(classes)],
        [
            helper.make_tensor("filters", TensorProto.FLOAT, filters.shape, filters.ravel()),
            helper.make_tensor("middle", TensorProto.FLOAT, [], [4.0]),
            helper.make_tensor("large", TensorProto.FLOAT, [], [1e4]),
            helper.make_tensor("start", TensorProto.INT64, [1], [0]),
            helper.make_tensor("end", TensorProto.INT64, [1], [len(classes)]),
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        ],
    )
    written = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    metadata = {"version": "1", "space": f"space of {name}", "classes": json.dumps(classes), "data_hash": "0"}
    helper.set_model_props(written, metadata | {"dim": "12", "image_size": "28"})
    onnx.save(written, files.ONNX)
    test = [sample for sample in webdataset.read(webdataset.tars("test")) if sample.label >= 0]
    vectors = Encoder().embed(decode(sample.data) for sample in test)
    labels, keys = torch.tensor([sample.label for sample in test]), [sample.key for sample in test]
    features.save("pretrained", {"test": features.Split(torch.from_numpy(vectors), labels, keys)})
    return files.sha256(files.ONNX)


@pytest.fixture(scope="session")
def indexed(tmp_path_factory, small_shards, write_encoder):
    """A project with an encoder of four classes and an index of its 260 training images; no test may change it."""
    from barlow import index

    folder = tmp_path_factory.mktemp("indexed")
    (folder / "data").mkdir()
    (folder / "data/shards").symlink_to(small_shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_encoder("edges", ["a", "b", "c", "d"])
        index.run()
    return folder
