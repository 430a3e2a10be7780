import os

import pytest
from PIL import Image

from barlow.core import images, walk
from barlow.core.walk import LeftOut


def make(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def found(root):
    left_out = LeftOut()
    return ["/".join(file.parts) for file in walk.walk(root, left_out)], left_out


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_an_image_is_one_whatever_its_name(tmp_path, kind):
    data = images.encode(Image.new("RGB", (5, 4)), kind)
    make(tmp_path, {"0f3a9c": data, "a.jpg_large": data, "scan.jpg.1": data, "notes.txt": data})
    names, left_out = found(tmp_path)
    assert names == ["0f3a9c", "a.jpg_large", "notes.txt", "scan.jpg.1"]
    assert left_out.notes() == []


def test_files_that_are_no_images_are_counted_by_kind(tmp_path):
    make(tmp_path, {f"{i}.xml": b"<annotation/>" for i in range(30)})
    make(tmp_path / "a", {"b.XML": b"<x/>", "BMW.txt": b"BMW and Audi", "Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(500)})
    make(
        tmp_path,
        {"README": b"x", "empty": b"", "desktop.ini": b"[x]", "text.jpg": b"x", "none.png": b"", "i.HEIC": b""},
    )
    make(tmp_path / "__MACOSX", {"a/x.jpg": b"\0\5\x16\7"})
    names, left_out = found(tmp_path)
    assert names == ["i.HEIC", "none.png", "text.jpg"]  # by name; validate says that they are broken
    assert left_out.others == {".xml": 31, ".txt": 1, ".db": 1, "README": 1, "empty": 1, ".ini": 1}
    assert left_out.notes()[0].startswith("left out: 36 files that are no images: .xml 31, ")
    assert left_out.notes()[1:] == ["left out: hidden files or folders: 1"]


def test_many_kinds_are_summed_up(tmp_path):
    make(tmp_path, {f"a.x{i}": b"x" for i in range(9)})
    (note,) = found(tmp_path)[1].notes()
    assert note == "left out: 9 files that are no images: .x0 1, .x1 1, .x2 1, .x3 1, .x4 1, .x5 1, 3 more kinds"


def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.jpg")
    names, left_out = found(tmp_path)
    assert names == ["pipe.jpg"]  # ingest says why it cannot be read
    assert left_out.others == {"pipe": 1}
    for path in (tmp_path / "pipe.jpg", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            walk.read(path)


def test_what_is_gone_is_yielded_if_it_may_have_been_an_image(tmp_path):
    for name in ("gone.jpg", "gone", "gone.xml"):
        (tmp_path / name).symlink_to("nowhere")
    names, left_out = found(tmp_path)
    assert names == ["gone", "gone.jpg"]
    assert left_out.others == {".xml": 1}


def test_a_file_that_cannot_be_read_is_yielded(tmp_path, monkeypatch):
    make(tmp_path, {"a": b"x", "b.xml": b"x"})

    def refuse(path, mode):
        raise PermissionError

    monkeypatch.setattr(walk.Path, "open", refuse)
    assert found(tmp_path)[0] == ["a"]


def test_names_that_are_not_utf8_can_be_read():
    assert walk.readable(os.fsdecode(b"\xe9 \xc3\xa9")) == "\\xe9 é"
