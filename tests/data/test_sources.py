import dataclasses
import json
import os

import pandas as pd
import pytest

from barlow.core import files
from barlow.core.errors import UserError
from barlow.data import sources, synthetic


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def source(smoke, change):
    return lambda source: change(smoke, "ingest", source=str(source)).ingest


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


@pytest.mark.parametrize(
    ("path", "split", "label"),
    [
        ("a.jpg", None, None),
        ("cat/a.jpg", None, "cat"),
        ("cat/deep/er/a.jpg", None, "cat"),
        ("train/cat/a.jpg", "train", "cat"),
        ("Train/cat/sub/a.jpg", "train", "cat"),
        ("valid/cat/a.jpg", "val", "cat"),
        ("validation/ça va/a.jpg", "val", "ça va"),
        ("test/a.jpg", "test", None),
        ("pretrain/cat/a.jpg", "pretrain", None),
        ("unlabelled/cat/a.jpg", "pretrain", None),
        ("Unlabeled/a.jpg", "pretrain", None),
        ("train/unlabelled/a.jpg", "train", None),
        ("cat/unlabelled/a.jpg", None, "cat"),
    ],
)
def test_folders_give_split_and_label(tmp_path, source, path, split, label):
    make(tmp_path / "photos", path)
    (row,) = sources.find(source(tmp_path / "photos"))[0].to_pylist()
    status = (tmp_path / "photos" / path).stat()
    assert row == {
        "path": path,
        "split": split,
        "label": label,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def test_links_loops_hidden_and_odd_names(tmp_path, source):
    photos = tmp_path / "photos"
    make(photos, "cat/a.jpg", "cat/.hidden.jpg", ".git/b.jpg", "dog/notes.txt")
    make(tmp_path / "elsewhere", "c.jpg", "inner/d.jpg")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "cat/self").symlink_to(photos / "cat")
    (photos / "cat/up").symlink_to("..")
    (photos / "cat/root").symlink_to(tmp_path.parent)
    (tmp_path / "elsewhere/inner/back").symlink_to(tmp_path / "elsewhere")
    (photos / "ring a").symlink_to("ring b")
    (photos / "ring b").symlink_to("ring a")
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "alias.jpg").symlink_to("cat/a.jpg")
    (photos / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    table, notes = sources.find(source(photos))
    assert table["path"].to_pylist() == [
        "\\xff.jpg",
        "alias.jpg",
        "cat/a.jpg",
        "gone.jpg",
        "linked/c.jpg",
        "linked/inner/d.jpg",
        "ring a",
        "ring b",
    ]
    assert table["bytes"].to_pylist() == [0, 9, 9, None, 5, 11, None, None]
    assert notes == [
        "left out: 1 file that is no image: .txt 1",
        "left out: hidden files or folders: 2",
        "left out: links back to a folder above, or to a folder a second time: 4",
    ]


def test_folders_that_link_to_each_other_do_not_explode(tmp_path, source):
    names = [f"tag{i}" for i in range(6)]
    make(tmp_path / "photos", *(f"{name}/a.jpg" for name in names))
    for name in names:
        for other in set(names) - {name}:
            (tmp_path / "photos" / name / other).symlink_to(tmp_path / "photos" / other)
    paths = sources.find(source(tmp_path / "photos"))[0]["path"].to_pylist()
    assert paths == sorted(
        [f"{name}/a.jpg" for name in names] + [f"{a}/{b}/a.jpg" for a in names for b in names if a != b]
    )


def test_a_folder_that_cannot_be_opened_is_listed_itself(tmp_path, source, monkeypatch):
    make(tmp_path / "photos", "cat/a.jpg", "locked/b.jpg")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert sources.find(source(tmp_path / "photos"))[0]["path"].to_pylist() == ["cat/a.jpg", "locked"]


def test_csv_gives_split_and_label_and_keeps_missing_files(tmp_path, source):
    make(tmp_path / "lists", "one, two.jpg", "b.jpg")
    text = 'label,path,split,note\n007,"one, two.jpg",Valid,x\n,b.jpg,,y\nNA,gone.jpg,test,z\n'
    (tmp_path / "lists/all.csv").write_text(text)
    rows = sources.find(source("lists/all.csv"))[0].drop(["mtime_ns", "ctime_ns", "inode"]).to_pylist()
    assert rows == [
        {"path": "b.jpg", "split": None, "label": None, "bytes": 5},
        {"path": "gone.jpg", "split": "test", "label": None, "bytes": None},
        {"path": "one, two.jpg", "split": "val", "label": "007", "bytes": 12},
    ]


def test_parquet_list_with_number_labels(tmp_path, source):
    pd.DataFrame({"path": ["a.jpg", "b.jpg"], "label": [3, 12]}).to_parquet(tmp_path / "all.parquet")
    assert sources.find(source("all.parquet"))[0]["label"].to_pylist() == ["3", "12"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("photo,label\na.jpg,x\n", "no column `path`, only photo, label"),
        ("path,split\na.jpg,extra\n", "split=extra is not allowed; it must be"),
        ("path\na.jpg\na.jpg\n", "lists a.jpg more than once"),
        ("path,label\n,x\n", "1 rows without a `path`"),
        ("path,label\n", "holds no images"),
        ("", "cannot be read as a table"),
        ("path,label\na.jpg\n", "cannot be read as a table"),
    ],
)
def test_bad_tables(tmp_path, source, text, message):
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        sources.find(source("all.csv"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["nowhere", "Synthetic", "nowhere.csv", "photo.jpg", "empty", "hidden", "data/raw", "."]
)
def test_what_is_no_source_is_refused_by_name(tmp_path, source, name):
    make(tmp_path, "photo.jpg", "hidden/.a.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "data/raw").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"^ingest\.source={name} (is no source|holds no images|overlaps data/raw)"):
        sources.find(source(name))


def test_prepare_makes_once_and_clears_only_what_it_made(tmp_path, source, smoke, change, monkeypatch):
    calls = []

    def write(root, p):
        calls.append(p.seed)
        make(root, f"train/cat/{p.seed}.jpg")

    monkeypatch.setattr(synthetic, "write", write)
    made = source("synthetic")
    sources.prepare(made)
    sources.prepare(made)
    assert calls == [made.synthetic.seed]
    reseeded = change(
        smoke, "ingest", source="synthetic", synthetic=made.synthetic.__class__(**vars(made.synthetic) | {"seed": 7})
    )
    sources.prepare(reseeded.ingest)
    assert calls == [made.synthetic.seed, 7]
    table, notes = sources.find(reseeded.ingest)
    assert table["path"].to_pylist() == ["train/cat/7.jpg"]
    assert notes == []

    make(tmp_path / "photos", "a.jpg")
    (files.RAW / "link").symlink_to(tmp_path / "photos")
    sources.prepare(source("photos"))
    assert list(files.RAW.iterdir()) == []
    assert (tmp_path / "photos/a.jpg").exists()

    make(files.RAW, "mine.jpg")
    for name in ("photos", "synthetic"):
        with pytest.raises(UserError, match="holds files that ingest did not put there"):
            sources.prepare(source(name))
    assert (files.RAW / "mine.jpg").exists()


def test_prepare_cut_off_starts_again(source, monkeypatch):
    def die(root, p):
        make(root, "train/cat/half.jpg")
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "write", die)
    with pytest.raises(KeyboardInterrupt):
        sources.prepare(source("synthetic"))
    monkeypatch.setattr(synthetic, "write", lambda root, p: make(root, "train/cat/whole.jpg"))
    sources.prepare(source("synthetic"))
    assert sources.find(source("synthetic"))[0]["path"].to_pylist() == ["train/cat/whole.jpg"]


def test_data_are_the_same_if_what_decides_them_is(smoke):
    drawn = sources.identity(smoke.ingest)
    assert drawn == json.loads(json.dumps(drawn))  # as a file holds it
    assert {"source", "labels", "include", "val_fraction", "synthetic"} <= {*drawn}
    more = dataclasses.replace(smoke.ingest.synthetic, unlabelled=401)
    assert sources.identity(dataclasses.replace(smoke.ingest, synthetic=more)) != drawn
    photos = dataclasses.replace(smoke.ingest, source="photos")
    assert sources.identity(dataclasses.replace(photos, synthetic=more)) == sources.identity(photos)
    assert sources.identity(dataclasses.replace(photos, exclude=("*.gif",))) != sources.identity(photos)
