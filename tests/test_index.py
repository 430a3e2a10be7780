import io
import os

import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import helper
from PIL import Image
from pyarrow import parquet

from barlow import cli, index
from barlow.core import files, images, webdataset
from barlow.core.bands import decode
from barlow.core.errors import UserError
from barlow.encoder.encoder import Encoder
from barlow.encoder.search import Index

COLOURS = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200), "grey": (90, 90, 90)}


@pytest.fixture
def model(tmp_path, mean_onnx):
    """An encoder whose embedding is the mean of red, green and blue."""
    return mean_onnx(tmp_path / "encoder.onnx")


def encode(pixels, kind="PNG", **options):
    return images.encode(Image.fromarray(np.asarray(pixels, np.uint8)), kind, **options)


def plain(colour, size=(4, 6)):
    return np.broadcast_to(np.array(COLOURS[colour], np.uint8), (*size, 3))


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    put(folder / "top.png", encode(plain("red")))
    put(folder / "cats/1.png", encode(plain("green")))
    put(folder / "cats/old/2.jpg", encode(plain("blue"), "JPEG"))
    put(folder / "wäve/3.png", encode(plain("grey")))
    return folder


def read(out, space="mean"):
    return Index(out / f"{space}.npz", space)


def nearest(made, colour):
    """The name of the image that is nearest to a colour."""
    ids, _ = made.search(np.array([COLOURS[colour]], np.float32), 1)
    return made.names[ids[0, 0]]


def test_a_folders_name_is_the_label_of_what_lies_in_it(photos, model, tmp_path):
    index.run([photos], model, tmp_path / "out")
    made = read(tmp_path / "out")
    labels = dict(zip(made.names, made.labels, strict=True))
    assert labels == {f"{photos}/top.png": None, "cats/1.png": "cats", "cats/old/2.jpg": "old", "wäve/3.png": "wäve"}
    places = {"red": f"{photos}/top.png", "green": "cats/1.png", "blue": "cats/old/2.jpg", "grey": "wäve/3.png"}
    assert {colour: nearest(made, colour) for colour in COLOURS} == places
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mean.npz"]


def test_files_that_are_named_have_no_label(photos, model, tmp_path):
    named = [photos / "wäve/3.png", photos / "cats/1.png"]
    index.run(named, model, tmp_path)
    assert read(tmp_path).names == [os.fspath(path) for path in named]
    assert read(tmp_path).labels == [None, None]


def test_bad_files_are_told_and_skipped(photos, model, tmp_path, capsys):
    put(photos / "cats/broken.jpg", encode(plain("red", (40, 40)), "JPEG")[:-100])
    put(photos / "cats/text.png", b"I am a text.")
    put(photos / "cats/readme.txt", b"not looked at")
    (photos / "cats/gone.png").symlink_to("nowhere")
    put(photos / "cats/program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    index.run([photos, tmp_path / "none.png"], model, tmp_path / "out")
    made = read(tmp_path / "out")
    assert len(made) == 4
    assert nearest(made, "blue") == "cats/old/2.jpg"  # files after a bad one keep their names
    out, err = capsys.readouterr()
    told = dict(line.removeprefix("barlow index: ").split(": ", 1) for line in err.splitlines())
    assert "truncated" in told.pop("cats/broken.jpg").lower()
    assert told == {
        "cats/text.png": "not an image in a known format",
        f"{photos}/cats/gone.png": "No such file or directory",
        "cats/program.eps": "format EPS; decoded are BMP, JPEG, MPO, PNG, TIFF, WEBP",
        f"{tmp_path}/none.png": "No such file or directory",
    }
    assert out == f"{tmp_path}/out/mean.npz: 4 images, 0.0 MiB\n"


def test_without_an_image_there_is_no_index(tmp_path, model, capsys):
    (tmp_path / "empty").mkdir()
    put(tmp_path / "bad/text.png", b"I am a text.")
    out = tmp_path / "out"
    for folders in (["empty"], ["bad"], ["empty", "bad"]):
        paths = [os.fspath(tmp_path / folder) for folder in folders]
        assert cli.main(["index", *paths, "--model", os.fspath(model), "--out", os.fspath(out)]) == 2
        message = f"barlow index: no image in {', '.join(paths)}; name image files or a folder"
        assert capsys.readouterr().err.splitlines()[-1] == message
    assert not out.exists()


def test_without_shards_there_is_no_index(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no image in data/shards; name image files or a folder"):
        index.run(model=model)


def test_what_cannot_be_used_is_named(photos, model, tmp_path):
    with pytest.raises(UserError, match=r"none\.onnx is missing; run `barlow export`"):
        index.run([photos], tmp_path / "none.onnx", tmp_path)
    with pytest.raises(UserError, match=r"top\.png is a file; name a folder"):
        index.run([photos], model, photos / "top.png")


def test_embeddings_that_are_no_numbers_are_refused(photos, model, tmp_path):
    proto = onnx.load(model)
    proto.graph.node[-1].output[0] = "mean"
    proto.graph.node.append(helper.make_node("Sub", ["mean", "mean"], ["zero"]))
    proto.graph.node.append(helper.make_node("Div", ["zero", "zero"], ["embedding"]))
    onnx.save(proto, model)
    with pytest.raises(UserError, match=r"encoder\.onnx gives NaN or infinity"):
        index.run([photos], model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_unicode(tmp_path, model):
    put(tmp_path / os.fsdecode(b"caf\xe9") / "1.png", encode(plain("red")))
    index.run([tmp_path], model, tmp_path / "out")
    made = read(tmp_path / "out")
    assert (made.names, made.labels) == (["caf\\xe9/1.png"], ["caf\\xe9"])
    made.names[0].encode()  # an answer over HTTP must be UTF-8


@pytest.mark.parametrize(
    ("size", "wanted"), [((50, 30), (50, 30)), ((640, 320), (64, 32)), ((100, 400), (16, 64)), ((1, 500), (1, 64))]
)
def test_thumbnails_are_small_jpegs(tmp_path, model, size, wanted):
    (width, height) = size
    put(tmp_path / "photos/a.png", encode(plain("green", (height, width))))
    index.run([tmp_path / "photos"], model, tmp_path)
    thumbnail = Image.open(io.BytesIO(read(tmp_path).thumbnail(0)))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", wanted)
    assert np.abs(np.asarray(thumbnail).astype(int) - COLOURS["green"]).max() < 8


def test_thumbnails_are_upright_and_in_order(tmp_path, model):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for name, (colour, size) in {"a": ("red", (8, 8)), "c": ("blue", (9, 9)), "d": ("green", (5, 7))}.items():
        put(tmp_path / f"photos/{name}.png", encode(plain(colour, size)))
    put(tmp_path / "photos/b.png", encode(plain("grey", (10, 20)), exif=exif))
    index.run([tmp_path / "photos"], model, tmp_path)
    made = read(tmp_path)
    seen = [Image.open(io.BytesIO(made.thumbnail(i))) for i in range(4)]
    assert [image.size for image in seen] == [(8, 8), (10, 20), (9, 9), (7, 5)]
    for image, colour in zip(seen, ["red", "grey", "blue", "green"], strict=True):
        assert np.abs(np.asarray(image).mean((0, 1)) - COLOURS[colour]).max() < 8


def test_samples_of_named_images_are_the_first(tmp_path, model):
    contents = [encode(plain("red", (1 + i, 3))) for i in range(15)]
    for i, content in enumerate(contents):
        put(tmp_path / f"photos/kind/{i:02d}.png", content)
    put(tmp_path / "photos/kind/00a.png", b"no image to try the service with")
    index.run([tmp_path / "photos"], model, tmp_path)
    wanted = [(f"kind/{i:02d}.png", "kind", contents[i]) for i in range(12)]
    assert read(tmp_path).samples == wanted


def test_not_all_images_are_decoded_at_once(tmp_path, model, monkeypatch):
    """Only some images are decoded before the first is embedded, so photographs do not fill the memory."""
    content, ahead, count = encode(plain("red")), [], 40
    for i in range(count):
        put(tmp_path / f"photos/{i:02d}.png", content)
    decoded = []
    monkeypatch.setattr(index, "decode", lambda data, *more: decoded.append(0) or decode(data, *more))
    monkeypatch.setattr(files, "cpus", lambda: 1)
    monkeypatch.setattr(index.Encoder, "run", lambda _, images: (ahead.append(len(decoded)) or r for r in run(images)))

    def run(images):
        for image in images:
            yield image.mean((0, 1))[None].astype(np.float32), None

    index.run([tmp_path / "photos"], model, tmp_path)
    assert len(decoded) == len(ahead) == count
    assert ahead[0] < count / 2


@pytest.fixture
def packed(tmp_path, monkeypatch, model):
    """A project with shards: 6 labelled images, 4 of pretrain (one of which is in train too), and 30 of test."""
    monkeypatch.chdir(tmp_path)
    colours = list(COLOURS)

    def sample(key, colour, label):
        return webdataset.Sample(f"{key:024x}", encode(plain(colour, (3 + key % 5, 4))), "png", label, 3 + key % 5, 4)

    train = [sample(i, colours[i % 3], i % 3) for i in range(6)]
    pretrain = [sample(10, "grey", -1), train[4]._replace(label=-1), sample(11, "grey", -1), sample(12, "red", -1)]
    labels = [0] * 20 + [1] * 8 + [2] * 2
    test = [sample(100 + i, colours[label], label) for i, label in enumerate(labels)]
    for split, samples in {"train": train, "pretrain": pretrain, "test": test, "val": [sample(50, "red", 0)]}.items():
        webdataset.write(files.SHARDS / f"{split}-000000.tar", samples)
    files.write_json(files.SHARDS / webdataset.CLASSES_FILE, colours[:3])
    return {"train": train, "pretrain": pretrain, "test": test}


def accept(samples):
    """Write data/accepted.parquet with one path per sample; the first 24 digits of a hash are the key."""
    rows = {"path": [f"{s.key[-3:]}/ä.png" for s in samples], "sha256": [s.key + "f" * 40 for s in samples]}
    parquet.write_table(pa.table(rows), files.ACCEPTED)


def test_training_images_come_with_their_names_and_labels(packed, model):
    accept([*packed["train"], *packed["pretrain"][:1]])
    index.run(model=model)
    made = read(files.INDEX)
    wanted = {f"{i:03x}/ä.png": list(COLOURS)[i % 3] for i in range(6)} | {"00a/ä.png": None}
    wanted |= {f"{i:024x}": None for i in (11, 12)}  # those that the manifest does not have
    assert dict(zip(made.names, made.labels, strict=True)) == wanted
    assert len(made) == 9  # the image that is in both splits is there once, with its label
    vectors = Encoder(model).embed(decode(sample.data) for sample in packed["train"])
    ids, similarities = made.search(vectors, 1)
    np.testing.assert_allclose(similarities, 1, atol=1e-6)
    assert [made.labels[i] for i in ids[:, 0]] == ["red", "green", "blue"] * 2


def test_samples_are_test_images_one_per_class_in_turn(packed, model):
    accept(packed["test"])
    index.run(model=model)
    samples = read(files.INDEX).samples
    wanted = [0, 20, 28, 1, 21, 29, 2, 22, 3, 23, 4, 24]  # of 20 red, 8 green and 2 blue ones
    assert [sample.image for sample in samples] == [packed["test"][i].data for i in wanted]
    assert [sample.label for sample in samples] == ["red", "green", "blue"] * 2 + ["red", "green"] * 3
    assert samples[1].name == f"{packed['test'][20].key[-3:]}/ä.png"


def test_shards_without_labels_or_names(packed, model):
    (files.SHARDS / webdataset.CLASSES_FILE).unlink()
    for split, samples in packed.items():
        webdataset.write(files.SHARDS / f"{split}-000000.tar", [sample._replace(label=-1) for sample in samples])
    index.run(model=model)
    made = read(files.INDEX)
    assert made.names[:6] == [f"{i:024x}" for i in range(6)]
    assert set(made.labels) == {None}
    assert [sample.image for sample in made.samples] == [sample.data for sample in packed["test"][:12]]


def test_an_index_for_each_embedding_space(photos, model, tmp_path):
    index.run([photos], model, tmp_path / "out")
    proto = onnx.load(model)
    helper.set_model_props(proto, {"space": "second", "classes": "[]"})
    onnx.save(proto, model)
    index.run([photos / "cats"], model, tmp_path / "out")
    assert (len(read(tmp_path / "out")), len(read(tmp_path / "out", "second"))) == (4, 2)


def test_another_encoder_gets_an_index_of_the_same_images(photos, model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    index.run(["photos/cats"], model, out)
    proto = onnx.load(model)
    helper.set_model_props(proto, {"space": "second", "classes": "[]"})
    onnx.save(proto, model)
    monkeypatch.chdir(photos)  # and from anywhere
    index.run((), model, out)
    assert nearest(read(out, "second"), "green").endswith("cats/1.png")
    assert len(read(out, "second")) == 2
    helper.set_model_props(proto, {"space": "third", "classes": "[]"})
    onnx.save(proto, model)
    (out / "second.npz").write_bytes(b"no index")
    with pytest.raises(UserError, match=r"second\.npz is no whole index .*; remove it, or name the images"):
        index.run((), model, out)


def test_an_index_that_is_there_is_kept_if_told_to(photos, model, tmp_path, capsys):
    out = tmp_path / "out"
    index.run([photos], model, out, keep=True)
    before = (out / "mean.npz").read_bytes()
    index.run([photos / "cats"], model, out, keep=True)
    assert (out / "mean.npz").read_bytes() == before
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}/mean.npz is there"
    index.run([photos / "cats"], model, out)
    assert len(read(out)) == 2


def test_a_crash_leaves_the_old_index(photos, model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    index.run([photos], model, out)

    def full(file, **arrays):
        file.write(b"PK half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        index.run([photos / "cats"], model, out)
    assert [path.name for path in out.iterdir()] == ["mean.npz"]
    assert len(read(out)) == 4


def test_the_same_images_give_the_same_bytes(photos, model, tmp_path):
    for name in ("a", "b"):
        index.run([photos], model, tmp_path / name)
    assert (tmp_path / "a/mean.npz").read_bytes() == (tmp_path / "b/mean.npz").read_bytes()


def test_linked_folders_and_files_without_suffix_are_found_and_a_pipe_is_skipped(photos, model, tmp_path, capsys):
    put(tmp_path / "store/4.png", encode(plain("red")))
    put(photos / "cats/0f3a9c", encode(plain("red")))
    (photos / "more").symlink_to(tmp_path / "store")
    os.mkfifo(photos / "pipe.png")
    index.run([photos], model, tmp_path / "out")
    names = {f"{photos}/top.png", "cats/1.png", "cats/old/2.jpg", "wäve/3.png", "cats/0f3a9c", "more/4.png"}
    assert set(read(tmp_path / "out").names) == names
    assert capsys.readouterr().err == f"barlow index: {photos}/pipe.png: not a regular file\n"
