import os
import platform
import re
import signal
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from photos import fill, picture
from PIL import Image

from barlow import ingest, scan, validate
from barlow.core import files, images
from barlow.core.errors import DataError, Interrupted, UserError
from barlow.data import cache, facts, manifest


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
    assert "links back to a folder above, or to a folder a second time: 1" in output.out
    # No progress bar without a terminal, and no warning from Pillow; drawn from so few images, val lacks classes.
    assert all(re.match(r"warning: .*: \d of 3 classes have no image in", line) for line in output.err.splitlines())
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
    cache.PATH.unlink()
    read(photos)
    assert files.MANIFEST.read_bytes() == after
    capsys.readouterr()
    read(photos, max_pixels=50)  # the bound is part of the cache key
    assert "12 images: 12 new or changed, 0 cached" in capsys.readouterr().out


def test_damaged_cache_is_ignored(tmp_path, read, capsys):
    photos = fill(tmp_path / "photos", range(2))
    read(photos)
    cache.PATH.write_bytes(b"PAR1 nonsense")
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
        (("train", "val"), None),
        (("train",), r"no labelled image in test, so no accuracy will be measured; add test to the splits"),
        (("test",), r"no labelled image in train and val, so no accuracy will be measured; add train and val to the"),
        (("train", "test"), None),
        (("train", "val", "test"), None),
        (("pretrain",), None),  # never has labels
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
        r"no labelled image in test, .*; add labelled images, or raise ingest.val_fraction=0.2 and .*test_fraction=0, "
    )
    assert re.search(wanted, capsys.readouterr().err)


def test_without_labels_there_is_nothing_to_tell(tmp_path, read, capsys):
    read(fill(tmp_path / "photos", range(9), "train", "val"))
    assert capsys.readouterr().err == ""


def counts(rows):
    """Number of images by split and label."""
    return dict(Counter((row["split"], row["label"]) for row in rows.values()))


def test_what_was_understood_is_printed_as_a_table(tmp_path, read, capsys):
    photos = fill(
        tmp_path / "photos", range(9), "Training/cat", "Training/dog", "Testing/cat", "Testing/dog", "unlabelled"
    )
    (photos / "notes.txt").write_text("x")
    read(photos, val_fraction=0.0)
    assert capsys.readouterr().out.removeprefix(f"{photos}: ").replace(f"{photos}: ", "").splitlines() == [
        "folders taken as splits: Testing = test, Training = train",
        "left out: 1 file that is no image: .txt 1",
        "45 images: 45 new or changed, 0 cached",
        "  class       pretrain     train      test",
        "  cat                0         9         9",
        "  dog                0         9         9",
        "  (no label)         9         0         0",
        "  sum                9        18        18",
    ]


def test_ambiguous_folders_stop_before_anything_is_decoded(tmp_path, read, monkeypatch):
    photos = fill(tmp_path / "photos", range(2), "airplane", "car", "train")
    monkeypatch.setattr(facts, "read_all", None)  # would fail
    with pytest.raises(UserError, match="train/ is named like a split, but airplane/, car/ beside it are not"):
        read(photos)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    rows = read(photos, labels="classes", val_fraction=0.0, test_fraction=0.0)
    assert counts(rows) == {("train", "airplane"): 2, ("train", "car"): 2, ("train", "train"): 2}


def test_test_and_train_without_a_common_class_stop(tmp_path, read):
    photos = fill(tmp_path / "photos", range(2), "train/n01", "train/n02", "val/images", "test/images")
    with pytest.raises(UserError, match=r"no class of val \(images\) is one of train \(n01, n02\)"):
        read(photos)
    assert {row["label"] for row in read(photos, labels="none").values()} == {None}


def test_val_without_test_becomes_test(tmp_path, read, capsys):
    """The layout that torchvision gives Imagenette and CLEVR."""
    photos = fill(tmp_path / "photos", range(40), *(f"{s}/{c}" for s in ("train", "val") for c in ("cat", "dog")))
    rows = read(photos, val_fraction=0.2)
    for path, row in rows.items():
        drawn = "val" if int(row["sha256"][:8], 16) / 2**32 < 0.2 else "train"
        assert row["split"] == ("test" if path.startswith("val/") else drawn)
    assert set(splits(rows).values()) == {"train", "val", "test"}
    assert (
        "there is val but no test, so val is taken as test, and a new val is drawn from train"
        in capsys.readouterr().out
    )


def test_val_without_labels_does_not_become_test(tmp_path, read, capsys):
    """The layout of raw ILSVRC: train/<class>/ and val/ flat. A test split without labels would measure nothing."""
    photos = fill(tmp_path / "photos", range(20), "train/cat", "train/dog", "val")
    assert {row["split"] for path, row in read(photos).items() if path.startswith("val/")} == {"val"}
    assert "val has no labels, so it is not taken as test" in capsys.readouterr().out


def test_val_without_test_in_a_list(tmp_path, read):
    fill(tmp_path / "photos", range(2))
    text = "path,label,split\ncat/0.png,cat,train\ncat/1.png,cat,val\ndog/0.png,dog,train\ndog/1.png,dog,val\n"
    (tmp_path / "photos/list.csv").write_text(text)
    given = read("photos/list.csv", val_fraction=0.0)
    assert {path: row["split"] for path, row in given.items()} == {
        "cat/0.png": "train", "cat/1.png": "test", "dog/0.png": "train", "dog/1.png": "test",
    }  # fmt: skip
    (tmp_path / "photos/list.csv").write_text(text.replace("dog,train", "dog,"))  # its split is drawn
    assert read("photos/list.csv")["cat/1.png"]["split"] == "val"


def test_pretrain_never_has_labels(tmp_path, read, capsys):
    photos = fill(tmp_path / "photos", range(3), "pretrain/a", "pretrain/b", "train/cat", "train/dog")
    rows = read(photos, val_fraction=0.0)
    assert counts(rows) == {("pretrain", None): 6, ("train", "cat"): 3, ("train", "dog"): 3}
    (photos / "list.csv").write_text("path,label,split\ntrain/cat/0.png,cat,pretrain\ntrain/dog/0.png,dog,train\n")
    assert read(photos / "list.csv")["train/cat/0.png"]["label"] is None
    assert "labels of the split pretrain, which has none, left out: 1" in capsys.readouterr().out


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path, read, capsys, in_place):
    photos = fill(tmp_path / "photos", range(3))
    old, new = photos / "cat/0.bmp", tmp_path / "new.bmp"
    old.write_bytes(picture(1, "BMP"))
    before, status = read(photos)["cat/0.bmp"]["sha256"], old.stat()
    new.write_bytes(picture(2, "BMP"))
    if in_place:
        old.write_bytes(new.read_bytes())
    else:
        new.replace(old)
    os.utime(old, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (old.stat().st_size, old.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    capsys.readouterr()
    assert read(photos)["cat/0.bmp"]["sha256"] == files.sha256(old) != before
    assert "7 images: 1 new or changed, 6 cached" in capsys.readouterr().out


def test_patterns_choose_files_in_folders_and_lists(tmp_path, read, capsys):
    photos = fill(tmp_path / "photos", range(2), "cat", "dog", "dog/ground_truth")
    (photos / "cat/0_mask.png").write_bytes(picture(77))
    exclude = ("**/ground_truth/**", "*_mask.png")
    plain = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    assert sorted(read(photos, exclude=exclude)) == plain
    assert "left out: 3 by ingest.exclude" in capsys.readouterr().out
    assert sorted(read(photos, include=("cat",), exclude=("*_mask.png",))) == plain[:2]
    (photos / "list.csv").write_text("path\ncat/0_mask.png\ncat/0.png\ndog/ground_truth/0.png\n")
    assert sorted(read(photos / "list.csv", exclude=exclude)) == ["cat/0.png"]
    with pytest.raises(
        UserError, match=r"holds no images .*\(left out: 7 by ingest.include\) \(ingest.include: emu matches no"
    ):
        read(photos, include=("emu",))


def test_an_excluded_folder_is_not_ambiguous(tmp_path, read):
    photos = fill(tmp_path / "photos", range(2), "seg_train/a", "seg_train/b", "seg_test/a", "seg_test/b", "seg_pred")
    with pytest.raises(UserError, match="leave seg_pred/ out"):
        read(photos)
    rows = read(photos, exclude=("seg_pred",), val_fraction=0.0)
    assert counts(rows) == {(split, label): 2 for split in ("train", "test") for label in "ab"}


def test_masks_beside_photographs_are_told(tmp_path, read, capsys):
    photos = fill(tmp_path / "photos", range(5))
    for folder in ("cat", "dog"):
        for seed in range(5):
            mask = np.random.default_rng(seed).integers(0, 2, (8, 9), dtype=np.uint8) * 255
            (photos / folder / f"{seed}_mask.png").write_bytes(images.encode(Image.fromarray(mask), "PNG"))
    read(photos)
    told = "photos: 10 of 20 images have at most 16 grey values, for example cat/0_mask.png: masks? leave them out"
    assert told in capsys.readouterr().err
    read(photos, exclude=("*_mask.png",))
    assert "grey" not in capsys.readouterr().err


def test_folders_by_date_end_with_what_to_set(tmp_path, read, smoke, change, capsys):
    photos = fill(tmp_path / "photos", range(2), *(f"2024-06-{day:02}" for day in range(1, 31)))
    read(photos)
    err = capsys.readouterr().err
    assert re.search(
        r"^warning: .* of 30 classes have no image in val .*ingest\.val_fraction=.*ingest\.labels: none$", err
    )
    with pytest.raises(DataError, match=r"raise ingest\.val_fraction and .* set ingest\.labels: none"):
        validate.run(change(smoke, "validate", min_side=4, min_contrast=0))
