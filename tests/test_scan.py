import os
import shutil

import pytest
from photos import fill, picture

from barlow import ingest, scan
from barlow.core import files
from barlow.core.errors import UserError
from barlow.data import facts


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(facts, "CHUNK", 1000)  # in this process


def test_scan_changes_only_with_the_files(tmp_path, smoke, change):
    photos = fill(tmp_path / "photos", range(2))

    def scanned(source):
        scan.run(change(smoke, "ingest", source=str(source)))
        return scan.SOURCE.stat().st_ino, files.read_json(scan.SOURCE)

    inode, first = scanned(photos)
    assert scanned(photos) == (inode, first)  # the file was not written again
    assert (first["source"], first["files"]) == (str(photos), 4)
    assert first["bytes"] == sum(path.stat().st_size for path in photos.rglob("*.png"))
    os.utime(photos / "cat/0.png", ns=(1, 1))
    _, touched = scanned(photos)
    assert touched["listing_sha256"] != first["listing_sha256"]
    (photos / "cat/0.png").rename(photos / "cat/renamed.png")
    assert scanned(photos)[1]["listing_sha256"] not in (first["listing_sha256"], touched["listing_sha256"])
    assert scanned("synthetic")[1] == {"source": "synthetic"}
    assert scanned("torchvision:CIFAR10")[1] == {"source": "torchvision:CIFAR10"}
    with pytest.raises(UserError, match="is no source"):
        scanned("nowhere")


def test_scan_sees_a_changed_label_in_a_list(tmp_path, smoke, change):
    fill(tmp_path, range(1))
    params = change(smoke, "ingest", source="list.csv")
    (tmp_path / "list.csv").write_text("path,label\ncat/0.png,cat\n")
    scan.run(params)
    before = files.read_json(scan.SOURCE)
    (tmp_path / "list.csv").write_text("path,label\ncat/0.png,dog\n")
    scan.run(params)
    assert files.read_json(scan.SOURCE) != before


def test_scan_is_alike_for_a_copy_of_the_folder_and_heeds_patterns(tmp_path, smoke, change):
    photos = fill(tmp_path / "photos", range(2))
    params = change(smoke, "ingest", source=str(photos))
    scan.run(params)
    before = files.read_json(scan.SOURCE)
    shutil.copytree(photos, tmp_path / "copy")  # other inodes and ctimes
    photos.rename(tmp_path / "old")
    (tmp_path / "copy").rename(photos)
    scan.run(params)
    assert files.read_json(scan.SOURCE) == before
    scan.run(change(smoke, "ingest", source=str(photos), exclude=("dog",)))
    assert files.read_json(scan.SOURCE)["files"] == 2


def test_scan_notices_a_file_replaced_by_one_of_the_same_size_and_time(tmp_path, smoke, change):
    photos = fill(tmp_path / "photos", range(2))
    old, params = photos / "cat/0.bmp", change(smoke, "ingest", source=str(photos))

    def scanned():
        scan.run(params)
        return files.read_json(scan.SOURCE)

    old.write_bytes(picture(1, "BMP"))
    os.utime(old, ns=(0, 10**18))
    before = scanned()
    ingest.run(params)
    assert scanned() == before
    (tmp_path / "new.bmp").write_bytes(picture(2, "BMP"))
    os.utime(tmp_path / "new.bmp", ns=(0, 10**18))
    (tmp_path / "new.bmp").replace(old)
    after = scanned()
    assert after == before | {"replaced": {"cat/0.bmp": files.sha256(old)}}
    ingest.run(params)
    assert scanned() == after  # not again what it was before, for which DVC has the old manifest
    old.unlink()
    assert "replaced" not in scanned()


def test_scan_notes_given_weights_by_their_content(tmp_path, smoke, change):
    scan.run(smoke)
    assert files.read_json(scan.START) == files.read_json(scan.COMPARED) == []
    (tmp_path / "a.pth").write_bytes(b"weights")
    params = change(smoke, "model", weights="a.pth")
    params = change(params, "extract", weights=("timm:resnet18.a1_in1k", "a.pth"))
    scan.run(params)
    known = {"name": "a.pth", "sha256": files.sha256("a.pth")}
    assert files.read_json(scan.START) == [known]
    assert files.read_json(scan.COMPARED) == [{"name": "timm:resnet18.a1_in1k"}, known]
    before = scan.START.stat().st_ino
    scan.run(params)
    assert scan.START.stat().st_ino == before  # the file was not written again
    (tmp_path / "a.pth").write_bytes(b"other weights")
    scan.run(params)
    assert files.read_json(scan.START) == [{"name": "a.pth", "sha256": files.sha256("a.pth")}] != [known]
    (tmp_path / "a.pth").unlink()
    with pytest.raises(UserError, match=r"model\.weights=a\.pth is no file"):
        scan.run(params)
