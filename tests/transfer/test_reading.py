import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from barlow.core.errors import UserError
from barlow.transfer import reading

GIVEN = "model.weights=a.pth"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.pth"


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {"conv1.weight": torch.randn(2, 3), "bn1.num_batches_tracked": torch.tensor(7)}


def same(found, wanted):
    assert {*found} == {*wanted}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_content_decides_which_kind_of_file_it_is(path, tensors):
    save_file(tensors, path)
    same(reading.read(path, GIVEN), tensors)
    torch.save(tensors, path)
    same(reading.read(path, GIVEN), tensors)
    torch.save(tensors, path, _use_new_zipfile_serialization=False)  # as before torch 1.6
    same(reading.read(path, GIVEN), tensors)


def test_dictionaries_in_a_checkpoint_are_joined_by_dots(path, tensors):
    torch.save({"epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(1)}}}, "state_dict": tensors}, path)
    wanted = {f"state_dict.{name}": value for name, value in tensors.items()}
    same(reading.read(path, GIVEN), wanted | {"optimizer.state.0.m": torch.ones(1)})


class Runs:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_no_code_in_a_file_runs(path, tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"conv1.weight": Runs()}, path)
    with pytest.raises(UserError, match=r"^model\.weights=a\.pth (holds a Python object|is no whole)") as caught:
        reading.read(path, GIVEN)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_file_is_one_line(path, tensors, kind, kept):
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"is no whole safetensors or PyTorch file .*; copy it again") as caught:
        reading.read(path, GIVEN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": 1}',
        b"{" * 100,
    ],
)
@pytest.mark.parametrize("length", [None, 2**60])
def test_a_header_that_lies_is_one_line(path, header, length):
    path.write_bytes(struct.pack("<Q", length or len(header)) + header + b"\0\0\0\0")
    with pytest.raises(UserError, match="is no whole safetensors or PyTorch file"):
        reading.read(path, GIVEN)


def test_a_zip_bomb_is_not_unpacked(path, tmp_path):
    plain = tmp_path / "plain.pth"
    torch.save({"conv1.weight": torch.zeros(1_000_000)}, plain)
    with zipfile.ZipFile(plain) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match=r"^model\.weights=a\.pth is a compressed archive"):
        reading.read(path, GIVEN)


def test_a_file_without_named_tensors_says_so(path):
    for content in (torch.ones(2), [torch.ones(2)], {"epoch": 1}, {}):
        torch.save(content, path)
        with pytest.raises(UserError, match="holds no tensors by name"):
            reading.read(path, GIVEN)


def test_dictionaries_that_hold_each_other_end(path, monkeypatch):
    """Ten names for ten names for ... one dictionary: few bytes, many entries."""
    monkeypatch.setattr(reading, "ENTRIES", 500)
    content = {"a": torch.ones(1)}
    for _ in range(3):
        content = dict.fromkeys(map(str, range(10)), content)
    torch.save(content, path)
    with pytest.raises(UserError, match="holds more than 500 entries"):
        reading.read(path, GIVEN)
