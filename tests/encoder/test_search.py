import json
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from barlow import index
from barlow.core.errors import UserError
from barlow.encoder import search
from barlow.encoder.encoder import unit
from barlow.encoder.search import Index, Item

RNG = np.random.default_rng(0)
DIM = 24


@pytest.fixture
def build(tmp_path):
    """`build(vectors)` indexes int8 vectors (n, 24): images of 8 x 1 pixels, whose values the encoder copies."""
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("Sub", ["flat", "middle"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "copy",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", DIM])],
        [helper.make_tensor("middle", TensorProto.FLOAT, [], [128.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"space": "copy", "classes": "[]"})
    onnx.save(model, tmp_path / "copy.onnx")

    def build(vectors):
        folder = tmp_path / "images"
        folder.mkdir()
        for number, vector in enumerate(np.asarray(vectors)):
            pixels = (vector + 128).astype(np.uint8).reshape(1, 8, 3)
            Image.fromarray(pixels).save(folder / f"{number:05d}.bmp")
        index.run([folder], tmp_path / "copy.onnx", tmp_path)
        return Index(tmp_path / "copy.npz", "copy")

    return build


def random(count):
    return RNG.integers(-128, 128, (count, DIM))


def embeddings(vectors):
    return np.asarray(vectors, np.float32)


def cosines(queries, vectors):
    """By the definition, in float64."""
    queries, vectors = np.asarray(queries, np.float64), np.asarray(vectors, np.float64)
    return queries @ vectors.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(vectors, axis=1)


@pytest.mark.parametrize("k", [1, 10, 199, 200])
def test_the_nearest_are_those_of_scikit_learn(build, k):
    vectors, queries = random(200), random(30)
    nearest, similarities = build(vectors).search(embeddings(queries), k)
    distances, wanted = (
        NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(vectors).kneighbors(queries)
    )
    np.testing.assert_array_equal(nearest, wanted)
    np.testing.assert_allclose(similarities, 1 - distances, atol=1e-6)
    np.testing.assert_allclose(similarities, np.take_along_axis(cosines(queries, vectors), nearest, 1), atol=1e-6)


def test_more_than_there_are_gives_all(build):
    vectors, queries = random(5), random(3)
    nearest, similarities = build(vectors).search(embeddings(queries), 100)
    np.testing.assert_array_equal(nearest, np.argsort(-cosines(queries, vectors), axis=1))
    assert similarities.shape == (3, 5)


def test_one_image_is_an_index(build):
    (vector,) = vectors = random(1)
    made = build(vectors)
    nearest, similarities = made.search(embeddings([vector, -vector]), 10)
    np.testing.assert_array_equal(nearest, [[0], [0]])
    np.testing.assert_allclose(similarities, [[1], [-1]], atol=1e-6)
    np.testing.assert_array_equal(made.places, [[0, 0]])


def test_no_query_has_no_neighbours(build):
    made = build(random(5))
    nearest, similarities = made.search(np.empty((0, DIM), np.float32), 3)
    assert nearest.shape == similarities.shape == (0, 3)
    assert made.place(np.empty((0, DIM), np.float32)).shape == (0, 2)


def test_ties_are_all_found(build):
    vectors = random(12)
    vectors[[2, 5, 9]] = vectors[0]
    made = build(vectors)
    for k in (2, 4, 6):
        (nearest,), (similarities,) = made.search(embeddings(vectors[:1]), k)
        assert len(set(nearest)) == k
        assert set(nearest[:4]) <= {0, 2, 5, 9}
        np.testing.assert_allclose(similarities[:4], 1, atol=1e-6)
        assert (np.diff(similarities) <= 0).all()


def test_a_length_makes_no_difference_and_none_is_like_nothing(build):
    vectors = random(20)
    vectors[7] = 0
    made = build(vectors)
    (a, b, zero), (first, second, none) = made.search(embeddings([vectors[3], 50 * vectors[3], 0 * vectors[3]]), 20)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert first[list(a).index(7)] == 0
    np.testing.assert_array_equal(none, np.zeros(20))
    assert sorted(zero) == list(range(20))
    assert np.isfinite(made.places).all()


def test_places_are_the_first_two_principal_components(build):
    vectors = random(300) * np.linspace(1, 0.1, DIM)
    vectors = vectors.round().astype(int)
    made, others = build(vectors), random(20)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pca = PCA(2, svd_solver="full").fit(unit)
    wanted = pca.transform(unit)
    scale = np.abs(wanted).max()
    signs = np.sign((made.places * wanted).sum(0))
    np.testing.assert_allclose(made.places * signs, wanted / scale, atol=1e-4)
    assert np.abs(made.places).max() == pytest.approx(1)
    new = pca.transform(others / np.linalg.norm(others, axis=1, keepdims=True)) / scale
    np.testing.assert_allclose(made.place(embeddings(3 * others)) * signs, new, atol=1e-4)  # whatever their length
    np.testing.assert_allclose(made.place(embeddings(vectors)), made.places, atol=1e-5)


def test_a_picture_for_each_number(build):
    made = build(random(4))
    assert len(made) == 4
    assert [made.thumbnail(i)[:2] for i in range(4)] == [b"\xff\xd8"] * 4
    for number in (-1, 4):
        with pytest.raises(IndexError):
            made.thumbnail(number)


@pytest.fixture
def few(monkeypatch):
    """Make the bound for an exact search 100 images."""
    monkeypatch.setattr(search, "EXACT", 100)


def test_many_are_searched_in_a_graph(build, few, tmp_path, monkeypatch):
    vectors, queries = random(1500), random(100)
    made = build(vectors)
    nearest, similarities = made.search(embeddings(queries), 10)
    wanted = np.argsort(-cosines(queries, vectors), axis=1)[:, :10]
    recall = np.mean([len({*ours} & {*exact}) / 10 for ours, exact in zip(nearest, wanted, strict=True)])
    assert recall > 0.99
    np.testing.assert_allclose(similarities, np.take_along_axis(cosines(queries, vectors), nearest, 1), atol=1e-5)
    assert (np.diff(similarities) <= 0).all()
    assert made.places.shape == (1500, 2)
    monkeypatch.setitem(sys.modules, "faiss", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"more than 100 images are searched with faiss; pip install 'barlow\[faiss\]'"):
        Index(tmp_path / "copy.npz", "copy")


def test_without_faiss_the_index_of_many_is_not_written(build, few, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'barlow\[faiss\]'"):
        build(random(101))
    assert not list(tmp_path.glob("*.npz"))


def test_up_to_the_bound_faiss_is_not_needed(build, few, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    vectors = random(100)
    (nearest,), _ = build(vectors).search(embeddings(vectors[42:43]), 1)
    assert nearest == [42]


@pytest.fixture
def written(tmp_path):
    """Write an index of three images; return its path, vectors, thumbnails and samples."""
    vectors = unit(embeddings(random(3)))
    thumbnails = [Item("a/1.jpg", "a", b"first"), Item("ä.png", None, b""), Item("b/2.jpg", "b", b"3")]
    samples = [Item("b/2.jpg", "b", b"the whole file"), Item("c.jpg", None, b"another")]
    path = tmp_path / "deep/made.npz"
    search.write(path, "made", vectors, thumbnails, samples, ["/a", "/b c"])
    return path, vectors, thumbnails, samples


def test_what_is_written_is_read(written):
    path, vectors, thumbnails, samples = written
    made = Index(path, "made")
    assert (made.names, made.labels) == (["a/1.jpg", "ä.png", "b/2.jpg"], ["a", None, "b"])
    assert [made.thumbnail(i) for i in range(3)] == [item.image for item in thumbnails]
    assert made.samples == samples
    nearest, similarities = made.search(vectors, 1)
    np.testing.assert_array_equal(nearest[:, 0], range(3))
    np.testing.assert_allclose(similarities, 1, atol=1e-6)
    np.testing.assert_array_equal(made.place(vectors), made.places)
    assert search.indexed_paths(path) == ["/a", "/b c"]


def test_the_file_is_as_the_format_says(written, tmp_path):
    """An index written by hand in format 1 has the same bytes, so existing files stay readable."""
    path, vectors, _, _ = written
    about = {"kind": "barlow index 1", "space": "made", "names": ["a/1.jpg", "ä.png", "b/2.jpg"]}
    about |= {"labels": ["a", None, "b"], "paths": ["/a", "/b c"], "samples": [["b/2.jpg", "b"], ["c.jpg", None]]}
    with np.load(path) as arrays:
        places, basis = arrays["places"], arrays["basis"]
    by_hand = tmp_path / "by hand.npz"
    np.savez(
        by_hand,
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
        vectors=vectors,
        places=places,
        basis=basis,
        offsets=np.array([0, 5, 5, 6]),
        thumbnails=np.frombuffer(b"first3", np.uint8),
        sample_sizes=np.array([14, 7]),
        samples=np.frombuffer(b"the whole fileanother", np.uint8),
    )
    assert by_hand.read_bytes() == path.read_bytes()
    assert (places.shape, places.dtype, basis.shape, basis.dtype) == ((3, 2), np.float32, (4, DIM), np.float32)
    np.testing.assert_allclose(basis[0], vectors.mean(0), atol=1e-6)
    np.testing.assert_allclose(basis[1:3] @ basis[1:3].T, np.eye(2), atol=1e-5)


def test_the_paths_of_a_damaged_index(written):
    path, *_ = written
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"made\.npz is no whole index .*; remove it, or name the images$"):
        search.indexed_paths(path)


def refused(path, space="copy"):
    with pytest.raises(UserError) as caught:
        Index(path, space)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path} is ")
    assert str(caught.value).endswith("; run `barlow index` for the model that is served")
    return str(caught.value)


def test_an_index_that_is_not_there(tmp_path):
    assert "none.npz is missing" in refused(tmp_path / "none.npz")


def test_an_index_of_another_space(build, tmp_path):
    build(random(3))
    assert "is of embedding space copy, not other" in refused(tmp_path / "copy.npz", "other")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_index(build, tmp_path, share):
    build(random(3))
    content = (tmp_path / "copy.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: int(share * len(content))])
    assert "is no whole index" in refused(tmp_path / "half.npz")


def test_an_index_with_a_byte_changed(build, tmp_path):
    build(random(50))
    content = bytearray((tmp_path / "copy.npz").read_bytes())
    content[content.index(b"vectors.npy") + 500] ^= 1
    (tmp_path / "changed.npz").write_bytes(content)
    assert "is no whole index" in refused(tmp_path / "changed.npz")


def test_an_index_of_another_barlow(build, tmp_path):
    build(random(3))
    with np.load(tmp_path / "copy.npz") as arrays:
        about = arrays["about"].tobytes().replace(b"barlow index 1", b"barlow index 9")
        np.savez(tmp_path / "newer.npz", **{**arrays, "about": np.frombuffer(about, np.uint8)})
    assert "is no whole index (ValueError('barlow index 9, not barlow index 1'))" in refused(tmp_path / "newer.npz")


class Trap:
    """What a pickle could do: call anything."""

    def __reduce__(self):
        return sys.exit, (99,)


def test_files_that_are_no_index(tmp_path):
    (tmp_path / "text.npz").write_text("I am a text.\n" * 100)
    np.savez(tmp_path / "pickled.npz", about=np.array([Trap()], dtype=object))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "json.npz", about=np.frombuffer(b'["x"]', np.uint8))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "folder.npz").mkdir()
    for path in tmp_path.iterdir():
        assert "is no whole index" in refused(path), path
