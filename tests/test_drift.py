import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from barlow import drift, embed
from barlow.core.errors import UserError
from barlow.encoder.encoder import Encoder
from barlow.encoder.registry import Registry

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(folder, n, seed, darker=0):
    """Write n plain orange pictures, each a little different."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(n):
        colour = rng.normal((200, 150, 100), 8) - darker
        Image.fromarray(np.tile(colour.astype(np.uint8), (4, 5, 1))).save(folder / f"{index:03}.png")
    return str(folder)


@pytest.fixture
def promote(tmp_path, mean_onnx):
    """`promote()` puts the next version into production, with its reference."""

    def promote(reference=None):
        onnx = mean_onnx(tmp_path / "encoder.onnx")
        folder = pictures(tmp_path / "trained", 60, 0)
        if reference is None:
            reference = Encoder(onnx).embed(sorted(Path(folder).iterdir()))
        np.save(tmp_path / "reference.npy", reference)
        registry = Registry("registry")
        with registry.locked():
            version = registry.add({name: tmp_path / name for name in ("encoder.onnx", "reference.npy")}, {})
            registry.point(version)
        return version

    return promote


@pytest.fixture
def check(tmp_path, monkeypatch, smoke, change, promote):
    """`check("folder", max_auc=0.6)` runs the command with its argument and settings, and returns the JSON."""
    monkeypatch.chdir(tmp_path)
    promote()

    def check(argument=None, **values):
        p = change(smoke, "promote", registry="registry")
        wanted = {"recent": None, "seed": 0, "max_images": 100, "min_images": 20, "max_auc": 0.6, "max_p": 0.01}
        drift.run(change(p, "drift", **wanted | {"breaches": 3} | values), argument)
        return json.loads((tmp_path / "models/drift.json").read_text())

    return check


def test_images_like_those_of_training(check, tmp_path, capsys):
    folder = pictures(tmp_path / "recent", 50, 1)
    result = check(folder)
    assert result["auc_low"] <= result["auc"] <= result["auc_high"]
    assert result["auc_low"] < 0.6
    assert result["mmd_p"] > 0.01
    figures = {
        name: result.pop(name) for name in ("auc", "auc_low", "auc_high", "mmd2", "mmd_p", "verdict", "evidence")
    }
    assert result == {
        "version": "v1", "space": "mean", "recent": folder, "images": 50, "skipped": 0, "skipped_first": [],
        "max_auc": 0.6, "breach": False, "breaches": 0, "drifted": False,
    }  # fmt: skip
    assert figures["verdict"].startswith("like what v1 was trained on: AUC 0.")
    assert capsys.readouterr() == (f"{figures['verdict']} ({folder}: 50 images, 0 files skipped)\n", "")


def test_the_same_result_twice(check, tmp_path):
    folder = pictures(tmp_path / "recent", 30, 1)
    first = check(folder, max_images=25)
    assert check(folder, max_images=25) == first
    assert check(folder, max_images=25, seed=1) != first


def test_darker_images_are_drift_when_they_come_in_a_row(check, promote, tmp_path, capsys):
    dark = [pictures(tmp_path / f"dark {i}", 40, 10 + i, darker=30) for i in range(7)]
    like = pictures(tmp_path / "like", 40, 2)
    few = pictures(tmp_path / "few", 5, 3, darker=30)

    def row(*recents):
        return [(r["breach"], r["breaches"], r["drifted"]) for r in map(check, recents)]

    assert row(*dark[:2]) == [(True, 1, False), (True, 2, False)]
    assert capsys.readouterr().out.splitlines()[1].startswith("breach: unlike what v1 was trained on, 2 in a row")
    assert row(few) == [(False, 2, False)]
    assert row(dark[1]) == [(True, 2, False)]  # the same images again do not count
    assert row(*dark[2:4]) == [(True, 3, True), (True, 4, True)]
    assert capsys.readouterr().out.splitlines()[-1].startswith("drift: unlike what v1 was trained on, 4 in a row")
    assert row(few, like, dark[4]) == [(False, 4, False), (False, 0, False), (True, 1, False)]
    promote()
    assert row(dark[5]) == [(True, 1, False)]
    promote()
    assert row(few) == [(False, 0, False)]


@pytest.mark.parametrize("bounds", [{"max_auc": 1.0}, {"max_p": 0.0}])
def test_a_breach_takes_both_tests(check, tmp_path, bounds):
    dark = pictures(tmp_path / "dark", 40, 1, darker=30)
    assert check(dark, **bounds)["breach"] is False


def test_too_few_images(check, tmp_path, capsys):
    result = check(pictures(tmp_path / "recent", 19, 1))
    assert (result["verdict"], result["images"], result["auc"], result["mmd_p"]) == ("too few images", 19, None, None)
    assert capsys.readouterr().out.startswith("too few images (")
    assert check(pictures(tmp_path / "recent", 20, 1))["verdict"].startswith("like")
    (tmp_path / "empty").mkdir()
    assert check("empty")["verdict"] == "too few images"


def test_files_that_are_no_images_are_skipped(check, tmp_path):
    folder = tmp_path / "recent"
    pictures(folder / "deep/er", 20, 1)
    for name in "abcdef":
        (folder / f"{name}.jpg").write_text("text")
        os.utime(folder / f"{name}.jpg", ns=(0, 0))
    (folder / "f.jpg").rename(folder / os.fsdecode(b"\xff.jpg"))
    (folder / "notes.txt").write_text("text")
    (folder / "gone.png").symlink_to("nothing")
    os.mkfifo(folder / "pipe.png")
    result = check(str(folder))
    assert (result["images"], result["skipped"]) == (20, 6)
    reason = "not an image in a known format"
    assert result["skipped_first"] == [f"{folder}/{name}.jpg: {reason}" for name in ("\\xff", "e", "d", "c", "b")]


def test_the_newest_images_are_looked_at(tmp_path):
    pictures(tmp_path / "recent", 6, 1)
    for name, time in {"000": 5, "001": 2, "002": 9, "003": 5, "004": 1, "005": 2}.items():
        os.utime(tmp_path / f"recent/{name}.png", (time, time))
    assert drift.newest(tmp_path, 4) == [f"{tmp_path}/recent/{name}.png" for name in ("002", "003", "000", "005")]


def test_at_most_max_images(check, tmp_path):
    folder = pictures(tmp_path / "recent", 40, 1)
    embed.run([folder], "recent.parquet", "encoder.onnx")
    assert [check(recent, max_images=30)["images"] for recent in (folder, "recent.parquet")] == [30, 30]


def test_embeddings_in_a_parquet_file(check, tmp_path):
    for name, darker in {"like": 0, "dark": 30}.items():
        embed.run([pictures(tmp_path / name, 40, 1, darker)], f"{name}.parquet", "encoder.onnx")
    assert check("dark.parquet")["breach"] is True
    result = check(recent="like.parquet")
    assert (result["breach"], result["recent"], result["images"]) == (False, "like.parquet", 40)


def test_the_argument_comes_before_the_params(check, tmp_path):
    result = check(pictures(tmp_path / "given", 20, 1), recent="elsewhere")
    assert result["recent"].endswith("given")


VECTORS = np.random.default_rng(0).random((30, 3), np.float32)


def write_parquet(vectors, space="mean", name="embedding"):
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    parquet.write_table(pa.table({name: column}).replace_schema_metadata(space and {"space": space}), "r.parquet")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda: None, r"r\.parquet does not exist; name a folder"),
        (
            lambda: Path("r.parquet").touch(),
            r"r\.parquet is no folder and no whole Parquet file \(.*; run `barlow",
        ),
        (
            lambda: write_parquet(VECTORS, "other"),
            r"r\.parquet: embedding space other, but v1 has mean; run `barlow em",
        ),
        (lambda: write_parquet(VECTORS, None), r"r\.parquet: embedding space unknown, but v1 has mean"),
        (lambda: write_parquet(VECTORS[:, :2].copy()), r"r\.parquet: no column embedding with 3 float32 per row; run"),
        (lambda: write_parquet(VECTORS.astype(float)), r"r\.parquet: no column embedding with 3 float32 per row; run"),
        (lambda: write_parquet(VECTORS, name="x"), r"r\.parquet: no column embedding with 3 float32 per row; run"),
        (
            lambda: write_parquet(VECTORS / np.float32([1, 0, 1])),
            r"r\.parquet: an embedding holds NaN or infinity; run",
        ),
    ],
)
def test_a_parquet_file_that_cannot_be_used(check, prepare, message):
    with np.errstate(divide="ignore"):
        prepare()
    with pytest.raises(UserError, match=message) as error:
        check("r.parquet")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            VECTORS[:, :2],
            r"v2/reference\.npy holds float32 of shape \(30, 2\), not at least 10 rows of 3 finite float32",
        ),
        (VECTORS[:9], r"holds float32 of shape \(9, 3\)"),
        (VECTORS.astype(float), r"holds float64 of shape"),
        (VECTORS * np.float32("nan"), r"3 finite float32; restore it, or promote another encoder"),
    ],
)
def test_a_reference_that_cannot_be_used(check, promote, tmp_path, reference, message):
    promote(reference)
    with pytest.raises(UserError, match=message):
        check(pictures(tmp_path / "recent", 20, 1))


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_a_reference_that_is_damaged(check, promote, tmp_path, content):
    path = promote().reference
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"v2/reference\.npy cannot be read \(.*\); restore it"):
        check(pictures(tmp_path / "recent", 20, 1))


def test_settings_that_cannot_be(check, tmp_path):
    with pytest.raises(UserError, match=r"no recent images are named; write `barlow drift FOLDER"):
        check()
    with pytest.raises(UserError, match=r"drift\.max_images=15 is below drift\.min_images=20; raise it"):
        check("recent", max_images=15)
    (tmp_path / "registry/production").unlink()
    with pytest.raises(UserError, match=r"promote\.registry=registry has nothing in production; run `barlow promote`"):
        check("recent")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", '{"version": "v1"}', '{"version": "v1", "space": "mean", "breaches": 1.5}',
                '{"version": "v1", "space": "mean", "breaches": -1}', b"\xff"],
)  # fmt: skip
def test_a_damaged_last_result_counts_as_none(check, tmp_path, capsys, content):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/drift.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert check(pictures(tmp_path / "dark", 40, 1, darker=30))["breaches"] == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: models/drift.json is not a result of `barlow drift` (")


def test_the_last_result_of_another_embedding_space_is_not_counted_on(check, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/drift.json").write_text('{"version": "v1", "space": "other", "breaches": 2}')
    assert check(pictures(tmp_path / "dark", 40, 1, darker=30))["breaches"] == 1


def test_a_pipe_in_place_of_recent_embeddings_is_refused(check, tmp_path):
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(UserError, match=r"drift\.recent=pipe\.parquet is not a regular file"):
        check("pipe.parquet")


def test_linked_folders_and_files_without_suffix_are_looked_at(tmp_path):
    pictures(tmp_path / "store", 2, 1)
    pictures(tmp_path / "recent", 1, 1)
    (tmp_path / "recent/000.png").rename(tmp_path / "recent/0f3a9c")
    (tmp_path / "recent/more").symlink_to(tmp_path / "store")
    assert sorted(drift.newest(tmp_path / "recent", 9)) == [
        f"{tmp_path}/recent/{name}" for name in ("0f3a9c", "more/000.png", "more/001.png")
    ]
