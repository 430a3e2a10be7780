import hashlib
import math
import os

import pytest

from barlow.core import files
from barlow.core.errors import UserError


def test_replacing_writes_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def crash():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_sorted_and_refuses_nan(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"b": 1, "a": "é"})
    assert path.read_text() == '{\n  "a": "é",\n  "b": 1\n}\n'
    assert files.read_json(path) == {"a": "é", "b": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": math.nan})
    assert files.read_json(path) == {"a": "é", "b": 1}


@pytest.mark.parametrize(
    ("hint", "end"),
    [([], ", or `dvc repro` for all that is needed"), (["; then try again"], "; then try again"), ([""], "")],
)
def test_what_is_required_must_exist(tmp_path, hint, end):
    path = tmp_path / "none.json"
    for missing in (path, str(path)):
        with pytest.raises(UserError) as caught:
            files.require(missing, "report", *hint)
        assert str(caught.value) == f"{path} is missing; run `barlow report`{end}"


def test_a_file_and_a_folder_are_there_and_a_broken_link_or_a_pipe_is_not(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    for name in ("empty", "folder", "link"):
        files.require(tmp_path / name, "report")
    for name in ("broken", "circle", "pipe"):
        with pytest.raises(UserError, match=rf"{name} is missing"):
            files.require(tmp_path / name, "report")


def test_sha256(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 3_000_000)
    assert files.sha256(path) == hashlib.sha256(b"x" * 3_000_000).hexdigest()
