import os

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from barlow import embed
from barlow.core.errors import UserError


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path)


@pytest.fixture
def project(tmp_path, monkeypatch, mean_onnx):
    monkeypatch.chdir(tmp_path)
    mean_onnx(tmp_path / "models/encoder.onnx")
    return tmp_path


def test_a_folder(project, capsys):
    for index, name in enumerate(["c.png", "b/ü x.JPG", "b/z/deep.bmp", "d.tiff", "a/y.webp"]):
        picture(project / "photos" / name, 40 * index)
    (project / "photos/notes.txt").write_text("no image")
    (project / "photos/b/loop").symlink_to("..")
    embed.run(["photos"], "out/vectors.parquet")
    table = parquet.read_table("out/vectors.parquet")
    wanted = ["c.png", "d.tiff", "a/y.webp", "b/ü x.JPG", "b/z/deep.bmp"]
    assert table["path"].to_pylist() == [f"photos/{name}" for name in wanted]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 3)
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist())[:, 0], [0, 120, 160, 40, 80], atol=1)
    assert table.column_names == ["path", "embedding"]
    metadata = table.schema.metadata
    assert (metadata[b"space"], metadata[b"version"]) == (b"mean", b"1")
    captured = capsys.readouterr()
    assert captured.out == "out/vectors.parquet: 5 embeddings of 3 values\n"
    assert captured.err == ""


def test_classes(project, mean_onnx):
    mean_onnx(project / "head.onnx", ["red", "green", "blue"])
    Image.new("RGB", (3, 3), (0, 1, 0)).save("green.png")
    embed.run(["green.png"], "vectors.parquet", "head.onnx")
    row = parquet.read_table("vectors.parquet").to_pylist()[0]
    assert row["class"] == "green"
    assert row["probability"] == pytest.approx(np.exp(2) / (2 + np.exp(2)))


def test_bad_files_cost_a_line_each(project, capsys):
    picture(project / "good.png", 7)
    (project / "text.jpg").write_text("text")
    (project / "empty.png").write_bytes(b"")
    data = (project / "good.png").read_bytes()
    (project / "half.png").write_bytes(data[: len(data) // 2])
    embed.run(["text.jpg", "good.png", "empty.png", "half.png", "none.png"], "vectors.parquet")
    assert parquet.read_table("vectors.parquet")["path"].to_pylist() == ["good.png"]
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["text.jpg", "empty.png", "half.png", "none.png"]
    assert lines[-1] == "barlow embed: none.png: No such file or directory"
    assert captured.out.endswith("1 embeddings of 3 values, 4 files skipped\n")


def test_when_all_fail_the_old_file_stays(project):
    (project / "vectors.parquet").write_text("old")
    (project / "text.jpg").write_text("text")
    with pytest.raises(UserError, match=r"none of the 2 files is an image .* text\.jpg, none\.jpg"):
        embed.run(["text.jpg", "none.jpg"], "vectors.parquet")
    assert (project / "vectors.parquet").read_text() == "old"
    assert sorted(path.name for path in project.iterdir()) == ["models", "text.jpg", "vectors.parquet"]


def test_an_empty_folder(project):
    (project / "photos").mkdir()
    with pytest.raises(UserError, match="there is no image in photos"):
        embed.run(["photos"], "vectors.parquet")


def test_out_is_a_folder(project):
    (project / "photos").mkdir()
    with pytest.raises(UserError, match=r"--out photos is a folder; name a file, such as photos/vectors\.parquet"):
        embed.run(["photos"], "photos")


def test_a_name_that_is_no_unicode(project):
    picture(project / "x.png", 1)
    (project / "x.png").rename(b"\xff.png".decode(errors="surrogateescape"))
    embed.run(["."], "vectors.parquet")
    assert parquet.read_table("vectors.parquet")["path"].to_pylist() == ["./\\xff.png"]


def test_rows_survive_being_written_in_groups(project, monkeypatch):
    monkeypatch.setattr(embed, "ROW_GROUP", 100)
    for index in range(250):
        picture(project / f"photos/{index:03}.png", index)
    embed.run(["photos"], "vectors.parquet")
    file = parquet.ParquetFile("vectors.parquet")
    assert file.num_row_groups == 2  # after two batches of 64, and what is left
    rows = file.read().to_pylist()
    assert [row["path"] for row in rows] == [f"photos/{index:03}.png" for index in range(250)]
    np.testing.assert_allclose([row["embedding"] for row in rows], np.arange(250)[:, None].repeat(3, 1), atol=1e-4)


def test_a_pipe_is_skipped(project, capsys):
    picture(project / "photos/a.png", 7)
    os.mkfifo(project / "photos/pipe.jpg")
    embed.run(["photos", "photos/pipe.jpg"], "vectors.parquet")
    assert parquet.read_table("vectors.parquet")["path"].to_pylist() == ["photos/a.png"]
    assert capsys.readouterr().err == "barlow embed: photos/pipe.jpg: not a regular file\n" * 2
