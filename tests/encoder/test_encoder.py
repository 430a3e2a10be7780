import itertools
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from scipy import special

from barlow.core.errors import UserError
from barlow.encoder import encoder
from barlow.encoder.encoder import Encoder

RNG = np.random.default_rng(0)
SIZES = [(4, 6), (5, 5), (4, 6), (1, 1), (6, 4), (5, 5), (4, 6)]
ARRAYS = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
MEANS = np.array([array.mean(axis=(0, 1)) for array in ARRAYS])


@pytest.fixture
def mean(tmp_path, mean_onnx):
    return Encoder(mean_onnx(tmp_path / "encoder.onnx"))


@pytest.fixture
def classifier(tmp_path, mean_onnx):
    return Encoder(mean_onnx(tmp_path / "encoder.onnx", ["red", "green", "blue"]))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_mixed_sizes_keep_their_order(mean, batch_size):
    embeddings = mean.embed(ARRAYS, batch_size=batch_size)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, MEANS, rtol=1e-6)


def test_every_kind_of_image(mean, tmp_path):
    grey = ARRAYS[0][:, :, 0]
    for name in ("a.png", "ü b.png"):
        Image.fromarray(ARRAYS[1]).save(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.zeros((2, 4, 3), np.uint8)
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=exif)
    kinds = [
        ARRAYS[0],
        np.asfortranarray(ARRAYS[0]),
        ARRAYS[0][::-1, ::-1],
        grey,
        Image.fromarray(grey),
        Image.fromarray(np.dstack([ARRAYS[0], grey])),
        tmp_path / "a.png",
        str(tmp_path / "ü b.png"),
        Image.open(tmp_path / "turned.png"),
    ]
    grey_mean = [grey.mean()] * 3
    wanted = [MEANS[0]] * 3 + [grey_mean, grey_mean, MEANS[0], MEANS[1], MEANS[1], [0, 0, 0]]
    np.testing.assert_allclose(mean.embed(kinds), wanted, rtol=1e-6)


def test_a_batch_as_one_array(mean):
    np.testing.assert_allclose(mean.embed(np.stack([ARRAYS[0], ARRAYS[2]])), MEANS[[0, 2]], rtol=1e-6)


def test_nothing_gives_no_rows(mean, classifier):
    assert mean.embed([]).shape == (0, 3)
    assert classifier.classify([]).shape == (0, 3)


def test_logits_only_with_a_head(mean, classifier):
    assert mean.classes is None
    assert mean.classify(ARRAYS) is None
    assert classifier.classes == ["red", "green", "blue"]
    np.testing.assert_allclose(classifier.classify(ARRAYS, batch_size=2), 2 * MEANS, rtol=1e-6)


def test_attributes(mean):
    assert mean.dim == 3
    assert mean.metadata == {"version": "1", "space": "mean", "classes": "[]"}


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        [[0, 0], [0, 0]],
        None,
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else str(value),
)
def test_what_is_no_image_is_refused_with_what_is_one(mean, image):
    with pytest.raises(
        ValueError, match=r"an image must be a uint8 array \(height, width, 3\) or .* a path; got "
    ) as caught:
        mean.embed([ARRAYS[0], image])
    if isinstance(image, np.ndarray):
        assert f"{image.dtype} of shape {image.shape}" in str(caught.value)


@pytest.mark.parametrize("one", [ARRAYS[0], Image.fromarray(ARRAYS[0]), "image.png"])
def test_one_image_is_not_taken_for_several(mean, one):
    with pytest.raises(ValueError, match=r"write \[image\]"):
        mean.embed(one)


def test_a_file_that_does_not_decode_is_named(mean, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"broken\.jpg: not an image"):
        mean.embed([tmp_path / "broken.jpg"])
    with pytest.raises(FileNotFoundError):
        mean.embed([tmp_path / "none.jpg"])


def test_images_are_drawn_a_batch_at_a_time(mean):
    drawn = []
    endless = (drawn.append(index) or ARRAYS[0] for index in itertools.count())
    results = mean.run(endless, batch_size=4)
    assert len(next(results)[0]) == 4
    assert len(drawn) <= 5


def test_the_memory_of_a_large_image_is_given_back(tmp_path, mean_onnx):
    """16 million pixels take 192 MB inside this network."""
    mean_onnx(tmp_path / "encoder.onnx")
    program = """
import sys, numpy, psutil
from barlow.encoder.encoder import Encoder
encoder, process, image = Encoder(sys.argv[1]), psutil.Process(), numpy.zeros((4000, 4000, 3), numpy.uint8)
encoder.embed([image[:32, :32]])
before = process.memory_info().rss
encoder.embed([image])
print((process.memory_info().rss - before) / 1e6)
"""
    command = [sys.executable, "-c", program, tmp_path / "encoder.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert float(done.stdout) < 100


def test_a_batch_is_bounded_in_pixels(monkeypatch):
    monkeypatch.setattr(encoder, "BATCH_PIXELS", 100)
    sides = [5, 5, 5, 5, 9, 5, 20, 5, 5]  # 25, 81 and 400 pixels
    pixels = [np.zeros((side, side, 3), np.uint8) for side in sides]
    batches = list(encoder.batches(pixels, size=3))
    assert [[len(image) for image in batch] for batch in batches] == [[5, 5, 5], [5], [9], [5], [20], [5, 5]]


def test_top1():
    logits = np.log(np.array([[1, 2, 1], [6, 3, 1]], np.float32)) + 90
    names, probabilities = encoder.top1(logits, ["a", "b", "c"])
    assert names == ["b", "a"]
    np.testing.assert_allclose(probabilities, [0.5, 0.6], rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-15)])
def test_unit_keeps_the_precision(dtype, tolerance):
    rows = np.array([[3, 4], [0, 0], [-1e-3, 0], [1e9, 1e9]], dtype)
    before, units = rows.copy(), encoder.unit(rows)
    assert units.dtype == dtype
    np.testing.assert_allclose(units, [[0.6, 0.8], [0, 0], [-1, 0], [0.5**0.5, 0.5**0.5]], atol=tolerance)
    np.testing.assert_array_equal(rows, before)
    assert encoder.unit(rows[:0]).shape == (0, 2)


@pytest.mark.parametrize("scale", [1, 100, 1e30])
def test_softmax(scale):
    logits = (scale * RNG.normal(size=(7, 5))).astype(np.float32)
    probabilities = encoder.softmax(logits)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, special.softmax(logits.astype(np.float64), axis=1), rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(encoder.softmax(logits[3]), probabilities[3])


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.onnx is missing; run `barlow export`"):
        Encoder(tmp_path / "none.onnx")


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_damaged_file(tmp_path, mean_onnx, cut):
    path = mean_onnx(tmp_path / "encoder.onnx")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"encoder\.onnx .*`barlow export`") as caught:
        Encoder(path)
    assert "\n" not in str(caught.value)


def test_text_file(tmp_path):
    (tmp_path / "encoder.onnx").write_text("not ONNX\n" * 100)
    with pytest.raises(UserError, match=r"encoder\.onnx is not a whole ONNX file .* run `barlow export` again"):
        Encoder(tmp_path / "encoder.onnx")


def test_somebody_elses_onnx(tmp_path):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", value[:1], value[1:])
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    with pytest.raises(UserError, match=r"other\.onnx was not written by `barlow export` .*x.*y"):
        Encoder(path)


def test_an_onnx_without_our_metadata(tmp_path, mean_onnx):
    proto = onnx.load(mean_onnx(tmp_path / "encoder.onnx"))
    proto.ClearField("metadata_props")
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(UserError, match=r"bare\.onnx was not written by `barlow export`"):
        Encoder(tmp_path / "bare.onnx")
