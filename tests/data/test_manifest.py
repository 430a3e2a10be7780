import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from barlow.core import files
from barlow.core.errors import UserError
from barlow.data import manifest


def rows(n):
    return [
        {"path": f"ü {i}.png", "split": "train", "label": "cat", "width": i, "sha256": f"{i:064x}", "brightness": i / 3}
        for i in range(n)
    ]


def test_same_rows_in_any_order_give_the_same_bytes(tmp_path):
    table = pa.Table.from_pylist(rows(9), manifest.SCHEMA)
    manifest.write(table, tmp_path / "a")
    manifest.write(table.take([3, 1, 0, 2, 8, 7, 6, 5, 4]).select(list(reversed(table.column_names))), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert manifest.read(tmp_path / "a").equals(table)


def test_missing_manifest_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run `barlow ingest`"):
        manifest.read()
    with pytest.raises(UserError, match="run `barlow validate`"):
        manifest.read(files.ACCEPTED)


@pytest.mark.parametrize(
    ("source", "root"),
    [
        ("synthetic", "data/raw"),
        ("torchvision:CIFAR10", "data/raw"),
        ("some/photos", "some/photos"),
        ("lists/all.csv", "lists"),
        ("lists/all.Parquet", "lists"),
    ],
)
def test_root(smoke, change, source, root):
    assert manifest.root(change(smoke, "ingest", source=source).ingest) == Path(root)


def test_hash_split_is_the_hash_read_as_a_fraction():
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4000)]
    splits = list(manifest.hash_split(digests, val_fraction=0.05, test_fraction=0.15))
    for digest, split in zip(digests, splits, strict=True):
        u = int(digest[:8], 16) / 2**32
        assert split == ("test" if u < 0.15 else "val" if u < 0.2 else "train")
    assert splits.count("test") == pytest.approx(600, abs=70)  # three standard deviations
    assert splits.count("val") == pytest.approx(200, abs=42)
    assert list(manifest.hash_split(digests[:7], 0.05, 0.15)) == splits[:7]
    assert list(manifest.hash_split([], 0.05, 0.15)) == []
