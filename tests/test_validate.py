import csv
import hashlib
import socket

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from barlow import ingest, validate
from barlow.core import files
from barlow.core.errors import DataError, UserError
from barlow.data import expectations, manifest, validation


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments):
        raise AssertionError("validation went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def table(n=200, **changes):
    """A manifest of n good images in two classes and all splits; `changes` are {column: {row: value}}."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        split = ("pretrain", "train", "val", "test")[i % 4]
        rows.append(
            {
                "path": f"{split}/{i:05d}.jpg",
                "split": split,
                "label": None if split == "pretrain" else ("cat", "dog")[i // 4 % 2],
                "width": 32,
                "height": 24,
                "mode": "RGB",
                "format": "JPEG",
                "bytes": 900,
                "sha256": hashlib.sha256(str(i).encode()).hexdigest(),
                "brightness": round(rng.normal(120, 10), 3),
                "contrast": round(rng.normal(40, 5), 3),
                "orientation": 1,
                "error": None,
            }
        )
    for column, values in changes.items():
        for i, value in values.items():
            rows[i][column] = value
            if column == "error":
                rows[i] |= dict.fromkeys(("width", "height", "mode", "format", "brightness", "contrast", "orientation"))
    return pa.Table.from_pylist(rows, manifest.SCHEMA)


BOUNDS = {
    "min_accepted_fraction": 0.98,
    "min_decodable_fraction": 0.99,
    "max_duplicate_fraction": 0.01,
    "min_side": 16,
    "max_side": 10_000,
    "max_bytes": 50_000_000,
    "modes": ("L", "RGB", "RGBA", "LA", "P", "CMYK", "I;16"),
    "formats": ("JPEG", "PNG", "WEBP", "BMP", "TIFF"),
    "min_images_per_class": 1,
    "brightness": (10.0, 245.0),
    "min_contrast": 3.0,
    "max_drift": 0.1,
}
LOOSE = {"min_accepted_fraction": 0.2, "min_decodable_fraction": 0.2, "max_duplicate_fraction": 0.5}


@pytest.fixture
def run(smoke, change):
    """`run(table, **bounds)` validates it and returns (accepted paths, reasons by path, summary)."""

    def run(table=None, source="photos", **bounds):
        if table is not None:
            manifest.write(table)
        validate.run(change(change(smoke, "validate", **BOUNDS | bounds), "ingest", source=source))
        return results()

    return run


def results():
    accepted = manifest.read(files.ACCEPTED)["path"].to_pylist() if files.ACCEPTED.exists() else None
    with files.QUARANTINE.open(newline="", encoding="utf-8") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    return accepted, reasons, files.read_json(files.VALIDATION)


def test_clean_manifest_is_accepted_whole_and_twice_alike(run, capsys):
    accepted, reasons, summary = run(table())
    assert accepted == table().sort_by("path")["path"].to_pylist()
    assert reasons == {}
    assert (summary["images"], summary["accepted"]["total"], summary["quarantined"]) == (
        200,
        200,
        {"total": 0, "by": {}},
    )
    assert all(check["success"] for check in summary["checks"].values())
    assert capsys.readouterr().out == "200 images: 200 accepted, 0 in quarantine\n"
    outputs = [files.ACCEPTED, files.QUARANTINE, files.VALIDATION]
    before = [path.read_bytes() for path in outputs]
    run()
    assert [path.read_bytes() for path in outputs] == before


def test_nasty_folder_every_image_accepted_or_named(nasty, run, smoke, change):
    folder, refused = nasty
    data = change(smoke, "ingest", source=str(folder), val_fraction=0.0, test_fraction=0.0)
    ingest.run(data)
    accepted, reasons, summary = run(source=str(folder), **LOOSE)
    assert sorted(accepted) == sorted(path for path, why in refused.items() if why is None)
    assert sorted([*accepted, *reasons]) == sorted(refused)
    for path, reason in reasons.items():
        assert any(part in reason for part in refused[path].split("|")), (path, reason)
    counts = summary["accepted"], summary["quarantined"]
    assert sum(each["total"] for each in counts) == summary["images"] == len(refused)
    assert all(each["total"] == sum(each["by"].values()) for each in counts)
    assert summary["quarantined"]["total"] == len(reasons)


def test_what_was_put_aside_can_be_seen(nasty, run, smoke, change, monkeypatch):
    monkeypatch.setattr(expectations, "write_docs", lambda *arguments: None)  # for speed
    folder, _ = nasty
    ingest.run(change(smoke, "ingest", source=str(folder), val_fraction=0.0, test_fraction=0.0))
    (folder / "bad/a.gif").unlink()  # gone since
    _, reasons, _ = run(source=str(folder), **LOOSE)
    shown = {path: files.QUARANTINED / f"{i:03d}.jpg" for i, path in enumerate(reasons)}
    assert {path for path, picture in shown.items() if picture.exists()} == {
        "bad/truncated.jpg",
        "bad/truncated.png",
        "bad/thin.png",
        "写真 1.jpg",
    }
    assert len(list(files.QUARANTINED.iterdir())) == 4
    with Image.open(shown["bad/thin.png"]) as thin, Image.open(shown["写真 1.jpg"]) as whole:
        assert (thin.size, whole.size) == ((24, 2), (24, 20))
    before = {path.name: path.read_bytes() for path in files.QUARANTINED.iterdir()}
    (files.QUARANTINED / "old.jpg").touch()
    run(source=str(folder), **LOOSE)
    assert {path.name: path.read_bytes() for path in files.QUARANTINED.iterdir()} == before


def test_pictures_are_small_and_of_files_that_are_not_too_large(tmp_path):
    for i in range(3):
        Image.effect_noise((300 + i, 120), 50).save(tmp_path / f"{i}.png")
    validate.picture(tmp_path, ["0.png"], max_bytes=100)
    assert not list(files.QUARANTINED.iterdir())
    validate.picture(tmp_path, ["0.png", "gone.png", "2.png"], max_bytes=10**9)
    assert sorted(path.name for path in files.QUARANTINED.iterdir()) == ["000.jpg", "002.jpg"]
    with Image.open(files.QUARANTINED / "000.jpg") as image:
        assert image.size == (96, 38)


def test_an_image_of_32_bits_is_refused_with_the_remedy(run):
    _, reasons, _ = run(table(mode={2: "F", 3: "I"}), modes=("RGB",), **LOOSE)
    remedy = "validate.modes=[RGB]; save the image with 8 or 16 bits, or add the mode"
    assert reasons == {"val/00002.jpg": f"mode F: {remedy}", "test/00003.jpg": f"mode I: {remedy}"}


def test_rows_outside_the_bounds_are_put_aside_by_name(run):
    bad = table(
        error={0: "image file is truncated"},
        format={1: "GIF"},
        mode={2: "1"},
        width={3: 15, 4: 10_001},
        height={4: 12, 5: 16},
        bytes={6: 50_000_001, 7: 50_000_000},
    )
    accepted, reasons, summary = run(bad, formats=("JPEG", "PNG"), modes=("RGB",), **LOOSE)
    side = "validate.min_side=16, validate.max_side=10000"
    assert reasons == {
        "pretrain/00000.jpg": "image file is truncated",
        "train/00001.jpg": "format GIF: validate.formats=[JPEG, PNG]",
        "val/00002.jpg": "mode 1: validate.modes=[RGB]",
        "test/00003.jpg": f"width 15: {side}",
        "pretrain/00004.jpg": f"width 10001, height 12: {side}",
        "val/00006.jpg": "bytes 50000001: validate.max_bytes=50000000",
    }
    assert sorted([*accepted, *reasons]) == sorted(bad["path"].to_pylist())
    assert summary["checks"]["width"]["unexpected"] == 2
    assert summary["checks"]["width"]["observed"] == pytest.approx(197 / 199, abs=1e-6)
    assert summary["checks"]["decodable"]["observed"] == pytest.approx(199 / 200, abs=1e-6)
    assert summary["quarantined"]["by"] == {
        "decodable": 1,
        "format": 1,
        "mode": 1,
        "width": 2,
        "bytes": 1,
    }


def test_one_copy_stays_in_test_before_val_before_train_before_pretrain(run):
    groups = [(0, 1, 2, 3), (4, 5), (9, 6), (8, 12), (16, 17, 18)]  # rows; i % 4: pretrain, train, val, test
    copies = table(sha256={i: f"{n:064x}" for n, group in enumerate(groups) for i in group}, format={18: "GIF"})
    accepted, reasons, summary = run(copies, **LOOSE)
    kept = {"test/00003.jpg", "train/00005.jpg", "val/00006.jpg", "pretrain/00008.jpg", "train/00017.jpg"}
    assert kept <= set(accepted)
    assert {path: reason for path, reason in reasons.items() if reason.startswith("duplicate")} == {
        "pretrain/00000.jpg": "duplicate of test/00003.jpg",
        "train/00001.jpg": "duplicate of test/00003.jpg",
        "val/00002.jpg": "duplicate of test/00003.jpg",
        "pretrain/00004.jpg": "duplicate of train/00005.jpg",
        "train/00009.jpg": "duplicate of val/00006.jpg",
        "pretrain/00012.jpg": "duplicate of pretrain/00008.jpg",
        "pretrain/00016.jpg": "duplicate of train/00017.jpg",
    }
    digests = manifest.read(files.ACCEPTED)["sha256"].to_pylist()
    assert len(set(digests)) == len(digests)
    assert summary["checks"]["distinct"]["observed"] == pytest.approx(1 - 8 / 200)
    assert summary["checks"]["unique_in_split"]["unexpected"] == 2


@pytest.mark.parametrize(
    ("changes", "check", "figure"),
    [
        ({"error": dict.fromkeys(range(0, 24, 2), "empty file")}, "decodable", "0.94      0.99"),
        ({"format": dict.fromkeys(range(0, 24, 2), "GIF")}, "accepted_fraction", "0.94      0.98"),
        ({"sha256": dict.fromkeys(range(0, 26, 2), "0" * 64)}, "distinct", "0.94      0.99"),
        ({"label": dict.fromkeys([1, 2, 3], "emu")}, "images_per_class", "0.666667         1"),
    ],
)
def test_a_bad_data_set_stops_with_a_table(run, changes, check, figure, capsys):
    files.ACCEPTED.parent.mkdir()
    files.ACCEPTED.write_bytes(b"an earlier success, not to be mistaken for this one's")
    with pytest.raises(DataError) as error:
        run(table(**changes), min_images_per_class=2)
    message = str(error.value)
    assert f"{check:18}" in message
    assert figure in message
    assert len(message.splitlines()) <= 20
    accepted, reasons, summary = results()
    assert accepted is None
    assert files.QUARANTINED.is_dir()
    assert not summary["checks"][check]["success"]
    assert (files.DATA_DOCS / "index.html").exists()
    if check == "images_per_class":
        assert all(f"    {split}/emu: 1" in message for split in ("train", "val", "test"))
    else:
        assert len(reasons) == 12
        assert f"10 of 12 (all in {files.QUARANTINE})" in message
        assert sum(path in message for path in reasons) == 10


def test_class_missing_from_a_split_counts_as_none(run):
    labels = dict.fromkeys(range(3, 200, 4), "cat")  # every test image
    with pytest.raises(DataError, match=r"images_per_class[^$]*    test/dog: 0"):
        run(table(label=labels))


def test_unlabelled_data_has_no_classes_to_count(run):
    accepted, _, summary = run(table(label=dict.fromkeys(range(200))), min_images_per_class=1000)
    assert len(accepted) == 200
    assert "images_per_class" not in summary["checks"]


def test_nothing_decodes(run):
    with pytest.raises(DataError, match="decodable"):
        run(table(error=dict.fromkeys(range(200), "empty file")))
    assert len(results()[1]) == 200


def test_changed_schema_stops(run):
    files.MANIFEST.parent.mkdir()
    wrong = table().set_column(3, "width", pa.array(["32"] * 200)).drop(["mode"])
    pq.write_table(wrong, files.MANIFEST)
    with pytest.raises(DataError) as error:
        run()
    assert "schema" in str(error.value)
    summary = validation.read()
    assert not summary.checks["schema"].success
    assert (summary.images, summary.accepted.total, summary.quarantined.total) == (200, 0, 0)
    assert "    mode: " in str(error.value)
    assert "    width: " in str(error.value)


def test_brightness_and_contrast_only_warn(run, capsys):
    accepted, reasons, summary = run(table(brightness={0: 9.5, 1: 250.0}, contrast={2: 1.0}))
    assert len(accepted) == 200
    assert reasons == {}
    assert not summary["checks"]["brightness"]["success"]
    assert (summary["checks"]["brightness"]["unexpected"], summary["checks"]["contrast"]["unexpected"]) == (2, 1)
    assert summary["checks"]["brightness"]["severity"] == "warning"
    output = capsys.readouterr().out
    assert "warning: brightness: 0.99 against 1, 2 outside; validate.brightness=[10.0, 245.0]" in output


def test_drift_is_against_the_last_accepted_manifest_of_the_source(run, capsys, monkeypatch):
    monkeypatch.setattr(expectations, "write_docs", lambda *arguments: None)  # for speed
    dark = table(brightness=dict.fromkeys(range(200), 50.0))
    assert "brightness_drift" not in run(table())[2]["checks"]
    with pytest.raises(DataError):
        run(table(error=dict.fromkeys(range(100), "empty file")))  # not accepted: nothing to compare with
    first = run(dark)[2]
    assert (first["checks"]["brightness_drift"]["observed"], first["checks"]["contrast_drift"]["observed"]) == (1, 0)
    assert (first["checks"]["brightness_drift"]["success"], first["checks"]["brightness_drift"]["severity"]) == (
        False,
        "warning",
    )
    assert "warning: brightness_drift: 1 against 0.1; validate.max_drift=0.1" in capsys.readouterr().out
    assert run(dark)[2] == first  # the same again, not 0
    half = run(table(brightness=dict.fromkeys(range(100), 50.0)))[2]
    assert half["checks"]["brightness_drift"]["observed"] == pytest.approx(0.5)
    assert "brightness_drift" not in run(dark, source="others")[2]["checks"]
    validate.LAST.write_text("{damaged")
    assert "brightness_drift" not in run(dark)[2]["checks"]


def test_ks_is_the_two_sample_statistic():
    from scipy.stats import ks_2samp

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 200, 300), rng.integers(50, 256, 500)
    histograms = [np.bincount(x, minlength=256).tolist() for x in (a, b)]
    assert validate._ks(*histograms) == pytest.approx(ks_2samp(a, b).statistic)


@pytest.mark.parametrize("splits", [("test", "val"), ("pretrain", "test")])
def test_too_few_images_to_train_on(run, splits):
    one = table(2, split=dict(enumerate(splits)), label={0: None, 1: None})
    with pytest.raises(
        UserError, match=rf"ingest.source=photos has {splits.count('pretrain')} accepted images to train on"
    ):
        run(one)
    assert not files.ACCEPTED.exists()


def sidecars(folder):
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(500))
    (folder / "README.txt").write_text("x")
    for i in range(30):
        (folder / f"{i}.xml").write_text("<annotation/>")


def test_files_that_are_no_images_do_not_count_as_broken_ones(tmp_path, run, smoke, change, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(30):
        noise = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    sidecars(folder)
    ingest.run(change(smoke, "ingest", source=str(folder)))
    assert "left out: 32 files that are no images: .xml 30, .txt 1, .db 1" in capsys.readouterr().out.replace(
        ".db 1, .txt 1", ".txt 1, .db 1"
    )
    accepted, reasons, _ = run(source=str(folder))
    assert (len(accepted), reasons) == (30, {})
    (folder / "text.jpg").write_text("x")  # a broken image
    ingest.run(change(smoke, "ingest", source=str(folder)))
    with pytest.raises(DataError, match=r"text\.jpg: not an image in a known format"):
        run(source=str(folder))
