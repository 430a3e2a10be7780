import os
import platform
import re
import signal
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from barlow import ingest, scan
from barlow.core import files, images
from barlow.core.errors import Interrupted, UserError
from barlow.data import facts, manifest


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(facts, "CHUNK", 1000)  # in this process


@pytest.fixture
def read(smoke, change):
    """`read(source, **data)` runs the stage and returns the manifest's rows by path."""

    def read(source, **values):
        ingest.run(change(smoke, "ingest", source=str(source), **values))
        return {row["path"]: row for row in manifest.read().to_pylist()}

    return read


def picture(seed, kind="PNG"):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return images.encode(Image.fromarray(noise), kind)


def fill(root, seeds, *folders):
    for folder in folders or ("cat", "dog"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            (root / folder / f"{seed}.png").write_bytes(picture(zlib.crc32(f"{folder}{seed}".encode())))
    return root


def splits(rows):
    return {path: row["split"] for path, row in rows.items()}


def test_nasty_folder_has_a_row_for_every_file(nasty, read, monkeypatch, capsys):
    folder, refused = nasty
    monkeypatch.setattr(facts, "CHUNK", 4)  # several processes
    rows = read(folder)
    assert sorted(rows) == sorted(refused)
    for path, why in refused.items():
        seen_by_validate = why is not None and why.startswith(("format", "height", "duplicate"))
        if why is None or seen_by_validate:
            assert rows[path]["error"] is None, path
        else:
            assert pd.Series(rows[path]["error"]).str.contains(why).all(), path
            assert str(folder) not in rows[path]["error"]
    kinds = {path: row["mode"] for path, row in rows.items() if path.startswith("kinds/")}
    assert set(kinds.values()) == {"L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", None}
    assert {row["format"] for row in rows.values()} == {"JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", None}
    rotated = rows["kinds/rotated.jpg"]
    assert (rotated["width"], rotated["height"], rotated["orientation"]) == (24, 20, 6)
    output = capsys.readouterr()
    assert f"{len(refused)} images: {len(refused) - 2} new or changed, 0 cached, 2 unreadable" in output.out
    assert "links not followed, back to a folder above or a second time: 1" in output.out
    assert output.err == ""  # no progress bar without a terminal, and no warning from Pillow
    read(folder)
    assert f" 0 new or changed, {len(refused) - 2} cached, 2 unreadable" in capsys.readouterr().out


def test_second_run_reads_only_what_is_new_or_changed(tmp_path, read, capsys):
    photos = fill(tmp_path / "photos", range(6))
    read(photos)
    assert "12 images: 12 new or changed, 0 cached" in capsys.readouterr().out
    before = files.MANIFEST.read_bytes()
    read(photos)
    assert "12 images: 0 new or changed, 12 cached" in capsys.readouterr().out
    assert files.MANIFEST.read_bytes() == before

    (photos / "cat/0.png").unlink()
    (photos / "cat/new.png").write_bytes(picture(99))
    (photos / "dog/1.png").write_bytes(b"broken now")
    size = (photos / "dog/2.png").stat().st_size
    (photos / "dog/2.png").write_bytes(bytes(size))
    os.utime(photos / "dog/2.png", (1, 1))
    rows = read(photos)
    assert "12 images: 3 new or changed, 9 cached" in capsys.readouterr().out
    assert rows["dog/2.png"]["bytes"] == size
    assert rows["dog/2.png"]["error"] == rows["dog/1.png"]["error"] == "not an image in a known format"
    after = files.MANIFEST.read_bytes()
    ingest.CACHE.unlink()
    read(photos)
    assert files.MANIFEST.read_bytes() == after
    capsys.readouterr()
    read(photos, max_pixels=50)  # the bound is part of the cache key
    assert "12 images: 12 new or changed, 0 cached" in capsys.readouterr().out


def test_damaged_cache_is_ignored(tmp_path, read, capsys):
    photos = fill(tmp_path / "photos", range(2))
    read(photos)
    ingest.CACHE.write_bytes(b"PAR1 nonsense")
    read(photos)
    output = capsys.readouterr().out
    assert "data/.ingest.parquet is damaged, so every image is read again" in output
    assert "4 images: 4 new or changed, 0 cached" in output


def test_interrupted_run_keeps_what_it_has_read(tmp_path, read, monkeypatch, capsys):
    photos = fill(tmp_path / "photos", range(4))

    def two_then_stop(read, chunks):
        yield read(chunks[0])
        yield read(chunks[1])
        os.kill(os.getpid(), signal.SIGTERM)
        yield read(chunks[2])

    with monkeypatch.context() as patch:
        patch.setattr(facts, "CHUNK", 2)
        patch.setattr(facts, "_map", two_then_stop)
        with pytest.raises(Interrupted, match="4 of 8 new images were read; run again"):
            read(photos)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not files.MANIFEST.exists()
    read(photos)
    assert "8 images: 4 new or changed, 4 cached" in capsys.readouterr().out


def test_splits_are_by_content_and_adding_images_moves_none(tmp_path, read):
    photos = fill(tmp_path / "photos", range(60))
    before = read(photos)
    for row in before.values():
        u = int(row["sha256"][:8], 16) / 2**32
        assert row["split"] == ("test" if u < 0.15 else "val" if u < 0.2 else "train")
    assert set(splits(before).values()) == {"train", "val", "test"}
    fill(photos, range(60, 90), "cat", "emu")
    (photos / "dog/copy.png").write_bytes((photos / "cat/3.png").read_bytes())
    after = read(photos)
    assert splits(before).items() <= splits(after).items()
    assert after["dog/copy.png"]["split"] == after["cat/3.png"]["split"]


def test_without_labels_train_becomes_pretrain(tmp_path, read, capsys):
    labelled = read(fill(tmp_path / "photos", range(40)))
    without = read(tmp_path / "photos", labels="none")
    assert {row["label"] for row in without.values()} == {None}
    assert splits(without) == {p: "pretrain" if s == "train" else s for p, s in splits(labelled).items()}

    (tmp_path / "photos/dog/broken.png").write_bytes(b"")
    for path in (tmp_path / "photos/dog").glob("[0-9]*"):
        path.unlink()
    one_class = read(tmp_path / "photos")
    assert {row["label"] for row in one_class.values()} == {None}
    assert "every label is cat, so they are dropped" in capsys.readouterr().out


def test_given_splits_stay_and_val_is_carved_out_of_train_only_when_there_is_none(tmp_path, read):
    photos = fill(tmp_path / "photos", range(80), "train/cat", "train/dog", "test/cat", "unlabelled")
    rows = read(photos, val_fraction=0.2)
    for path, row in rows.items():
        u = int(row["sha256"][:8], 16) / 2**32
        given = path.split("/")[0]
        carved = "val" if u < 0.2 else "train"
        assert row["split"] == {"train": carved, "test": "test", "unlabelled": "pretrain"}[given]
    assert "val" in splits(rows).values()
    fill(photos, range(1), "valid/cat", "train/unlabelled")
    rows = read(photos, val_fraction=0.2)
    assert {path for path, split in splits(rows).items() if split == "val"} == {"valid/cat/0.png"}
    assert rows["train/unlabelled/0.png"]["split"] == "pretrain"


def test_listed_file_that_is_missing_has_a_row(tmp_path, read):
    fill(tmp_path / "photos", range(1))
    (tmp_path / "photos/list.csv").write_text(
        "path,label,split\ncat/0.png,cat,test\ndog/0.png,dog,\ndog/1.png,dog,\n.,dog,\n"
    )
    rows = read("photos/list.csv")
    assert {path: row["error"] for path, row in rows.items()} == {
        "cat/0.png": None,
        "dog/0.png": None,
        "dog/1.png": "no such file, or a name that is not UTF-8",
        ".": "not a regular file",
    }
    assert rows["cat/0.png"]["split"] == "test"


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
def test_other_platforms_are_told_what_is_missing(smoke, monkeypatch, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for command in (lambda: ingest.run(smoke), lambda: scan.run(smoke)):
        with pytest.raises(UserError, match=rf"this is {system} on {machine}: NVIDIA DALI"):
            command()


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (("train", "val"), r"no labelled image in test, .* rename the split val to test \(a new val is then drawn"),
        (("train",), r"no labelled image in test, so no accuracy will be measured; add test to the splits"),
        (("test",), r"no labelled image in train and val, so no accuracy will be measured; add train and val to the"),
        (("train", "test"), None),
        (("train", "val", "test"), None),
        (("pretrain",), r"no labelled image in train and val and test, "),
    ],
)
def test_splits_that_give_no_accuracy_are_told(tmp_path, read, capsys, folders, said):
    photos = fill(tmp_path / "photos", range(30), *(f"{folder}/{name}" for folder in folders for name in ("a", "b")))
    read(photos, val_fraction=0.2)
    err = capsys.readouterr().err
    assert err == "" if said is None else re.search(rf"^warning: .*/photos has labels, but {said}", err)


def test_splits_that_were_drawn_empty_are_told(tmp_path, read, capsys):
    photos = fill(tmp_path / "photos", range(20))
    read(photos, val_fraction=0.2, test_fraction=0.0)
    wanted = (
        r"no labelled image in test, .*; add labelled images, or raise ingest.val_fraction=0.2 and .*test_fraction=0\n"
    )
    assert re.search(wanted, capsys.readouterr().err)


def test_without_labels_there_is_nothing_to_tell(tmp_path, read, capsys):
    read(fill(tmp_path / "photos", range(9), "train", "val"))
    assert capsys.readouterr().err == ""
