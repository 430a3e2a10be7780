import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from barlow.core import files, images
from barlow.core.errors import UserError
from barlow.data import facts


def picture():
    return images.encode(Image.new("RGB", (8, 9)), "PNG")


def test_facts_of_one_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "b.png")
    row, deep = facts.read_chunk(tmp_path, ["a.png", "b.png"], 10_000).to_pylist()
    assert row["brightness"] == pytest.approx(pixels.astype(np.float64).mean(), abs=6e-4)
    assert row["contrast"] == pytest.approx(pixels.astype(np.float64).std(), abs=6e-4)
    assert (deep["brightness"], deep["contrast"]) == (row["brightness"], row["contrast"])
    assert row["sha256"] == files.sha256(tmp_path / "a.png")
    assert (row["width"], row["height"], row["mode"], row["format"], row["orientation"]) == (40, 30, "L", "PNG", 1)
    assert deep["mode"] == "I;16"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_broken_exif_block_is_orientation_1(tmp_path, kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    (tmp_path / "plain").write_bytes(images.encode(image, kind))
    (tmp_path / "broken").write_bytes(images.encode(image, kind, exif=b"Exif\0\0junk, and more junk"))
    plain, broken = facts.read_chunk(tmp_path, ["plain", "broken"], 10_000).to_pylist()
    assert broken["error"] is None
    assert broken["pixels"] == plain["pixels"] == images.digest(images.decode((tmp_path / "plain").read_bytes()))
    assert broken["orientation"] == plain["orientation"] == 1


def test_unreadable_and_oversized_files(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture())

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert facts._read_image(tmp_path / "a.png", 100) == {"error": "cannot be read: Permission denied"}
    with (tmp_path / "film.png").open("wb") as file:
        file.truncate(16_000_801)
    row = facts._read_image(tmp_path / "film.png", 100)
    assert row == {
        "sha256": files.sha256(tmp_path / "film.png"),
        "error": "16000801 bytes, more than ingest.max_pixels can fill",
    }


def test_stopping_drops_what_waits(tmp_path):
    (tmp_path / "touched").mkdir()
    reading = facts._map(Path.touch, [tmp_path / "touched" / str(i) for i in range(20_000)])
    next(reading)
    reading.close()
    assert len(list((tmp_path / "touched").iterdir())) < 20_000


def test_killed_process_is_one_clear_line():
    with pytest.raises(UserError, match=r"was killed, most likely for lack of memory; lower ingest.max_pixels"):
        list(facts._map(os._exit, [1, 2]))


def test_processes_end_with_their_parent_even_if_it_was_killed(tmp_path):
    script = (
        "import os, pathlib; from barlow.data import facts; "
        "reading = facts._map(pathlib.Path.exists, [pathlib.Path('.')] * 50); next(reading); os.kill(os.getpid(), 9)"
    )
    # The processes share its output, so this returns only when the last of them has ended.
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=30, check=False)
    assert ended.returncode == -9


def test_grey_values_are_counted(tmp_path):
    mask = np.zeros((8, 9), np.uint8)
    mask[2:5] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.arange(72, dtype=np.uint8).reshape(8, 9)).save(tmp_path / "ramp.png")
    assert [row["greys"] for row in facts.read_chunk(tmp_path, ["mask.png", "ramp.png"], 100).to_pylist()] == [2, 72]
