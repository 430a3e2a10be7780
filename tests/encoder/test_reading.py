import os
import threading

from PIL import Image

from barlow.core import images
from barlow.data import sources
from barlow.encoder import reading


def test_files_are_read_ahead_in_order_and_only_a_few(monkeypatch):
    started, drawn = threading.Event(), []

    def slow_first(path, _):
        if path == "0":
            started.wait(5)  # until a later file was begun
        else:
            started.set()
        return path

    monkeypatch.setattr(reading, "_read", slow_first)
    ahead = reading.read_ahead((drawn.append(i) or str(i) for i in range(100)), threads=2)
    assert next(ahead) == ("0", "0")
    assert len(drawn) <= 6
    assert [path for path, _ in ahead] == [str(i) for i in range(1, 100)]


def test_a_folder_is_read_by_the_rules_of_ingest(tmp_path, smoke, change):
    """Links to folders, files without suffix, hidden files, loops, pipes and other files: as ingest finds them."""
    png = images.encode(Image.new("RGB", (4, 5)), "PNG")
    for name in (
        "photos/a.png",
        "photos/0f3a9c",
        "photos/b.jpg_large",
        "photos/._a.png",
        "photos/x/c.txt",
        "store/d.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png)
    photos = tmp_path / "photos"
    (photos / "more").symlink_to(tmp_path / "store")
    (photos / "x/loop").symlink_to(photos)
    (photos / "notes.txt").write_text("text")
    os.mkfifo(photos / "pipe.jpg")
    wanted = ["0f3a9c", "a.png", "b.jpg_large", "pipe.jpg", "more/d.png", "x/c.txt"]
    assert list(reading.find([photos, tmp_path / "none.jpg"])) == [
        *(f"{photos}/{name}" for name in wanted),
        f"{tmp_path}/none.jpg",
    ]
    listed = sources.find(change(smoke, "ingest", source=str(photos)).ingest)[0]["path"].to_pylist()
    assert listed == sorted(wanted)
    pixels = dict(reading.read_ahead(reading.find([f"{photos}/"]), threads=2))
    assert pixels.pop(f"{photos}/pipe.jpg") == "not a regular file"
    assert {image.shape for image in pixels.values()} == {(5, 4, 3)}
