import os
import shutil

import pyarrow as pa
import pytest

from barlow.core import files
from barlow.data import cache, facts, sources


@pytest.fixture
def ingested(tmp_path, monkeypatch, smoke, change):
    """The settings of a folder of four files whose facts are in the cache."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in "abcd":
        (tmp_path / f"photos/{name}.jpg").write_text(name)
        os.utime(tmp_path / f"photos/{name}.jpg", ns=(0, 10**18))
    p = change(smoke, "ingest", source="photos").ingest
    listing = sources.find(p)[0]
    rows = [facts._read_image(tmp_path / "photos" / path, 100) for path in listing["path"].to_pylist()]
    table = listing.select(cache.KEY)
    for field in facts.FACTS:
        table = table.append_column(field, [pa.array([row.get(field.name) for row in rows], field.type)])
    cache.write(table, p)
    return p


def current(p):
    """The paths that need not be read again."""
    return listed(p).join(cache.read(p), cache.KEY, join_type="inner")["path"].to_pylist()


def listed(p):
    return sources.find(p)[0]


def test_what_was_written_is_read_for_the_same_settings(ingested, change, smoke):
    assert cache.read(ingested)["path"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert cache.replaced(listed(ingested), ingested) == {}
    assert cache.read(change(smoke, "ingest", source="photos", max_pixels=7).ingest).num_rows == 0


def test_a_copy_is_told_from_a_replaced_file_by_its_content(ingested, tmp_path, capsys):
    shutil.copytree(tmp_path / "photos", tmp_path / "copy")
    shutil.rmtree(tmp_path / "photos")
    (tmp_path / "copy").rename(tmp_path / "photos")
    (tmp_path / "photos/c.jpg").write_text("C")
    os.utime(tmp_path / "photos/c.jpg", ns=(0, 10**18))
    assert current(ingested) == []
    assert cache.replaced(listed(ingested), ingested) == {"c.jpg": files.sha256(tmp_path / "photos/c.jpg")}
    assert "4 files have a new inode or change time" in capsys.readouterr().out
    assert sorted(current(ingested)) == ["a.jpg", "b.jpg", "d.jpg"]  # ingest reads c.jpg again
    assert list(cache.replaced(listed(ingested), ingested)) == ["c.jpg"]
    assert "1 files have a new inode" in capsys.readouterr().out


def test_a_file_of_another_time_is_not_compared(ingested, tmp_path, capsys):
    os.utime(tmp_path / "photos/a.jpg", ns=(0, 0))
    (tmp_path / "photos/b.jpg").unlink()
    assert cache.replaced(listed(ingested), ingested) == {}
    assert capsys.readouterr().out == ""
