import os
import re
import resource
import shutil
import subprocess
import threading
from concurrent import futures
from contextlib import contextmanager

import pytest
import torch

from barlow.core.errors import UserError
from barlow.training import checkpoint


def save(folder, step, **metadata):
    checkpoint.save(folder, step, {"w": torch.full((1000,), float(step))}, {"history": [], **metadata})


def test_the_newest_is_loaded_and_two_are_kept(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000010.safetensors",
        "step-000000015.safetensors",
    ]
    tensors, metadata = checkpoint.latest(tmp_path)
    assert metadata == {"history": [], "step": 15}
    assert torch.equal(tensors["w"], torch.full((1000,), 15.0))


@pytest.mark.parametrize("kept", [0, 5, 100, 2000])
def test_a_truncated_one_is_skipped_with_a_warning(tmp_path, capsys, kept):
    save(tmp_path, 5)
    save(tmp_path, 10)
    os.truncate(tmp_path / "step-000000010.safetensors", kept)
    assert checkpoint.latest(tmp_path)[1]["step"] == 5
    assert "step-000000010.safetensors is damaged" in capsys.readouterr().err


IDENTITY = {"pretrain": {"lambd": 0.002, "epochs": 8}, "model": {"arch": "resnet10"}, "data": "x"}


def test_a_run_has_a_folder_by_its_settings_data_and_code():
    found = checkpoint.folder(IDENTITY)
    assert found.parent == checkpoint.FOLDER
    assert checkpoint.folder(dict(reversed(IDENTITY.items()))) == found
    for key, value in {"data": "y", "code": "z", "model": {"arch": "resnet18"}}.items():
        assert checkpoint.folder(IDENTITY | {key: value}) != found


def test_other_runs_are_named_with_what_would_go_on_with_them(tmp_path):
    ours, older, foreign = tmp_path / "ours", tmp_path / "older", tmp_path / "foreign"
    save(ours, 5, identity=IDENTITY)
    save(older, 7, identity=IDENTITY | {"pretrain": {"lambd": 0.1, "epochs": 8}, "data": "y"})
    foreign.mkdir()
    (foreign / "step-000000009.safetensors").write_bytes(b"damaged")
    told = list(checkpoint.others(ours, IDENTITY))
    assert len(told) == 2
    assert told[0] == f"{foreign} has a damaged checkpoint of another run; delete the folder"
    wanted = "(other data, pretrain.lambd=0.1); set that back to resume it, or delete the folder"
    assert told[1] == f"{older} has checkpoints of another run {wanted}"
    assert "pretrain.lambd=0.002" in list(checkpoint.others(older, IDENTITY | {"pretrain": {"lambd": 0.1}}))[1]
    save(older, 9, identity=IDENTITY)
    assert "(other code)" in list(checkpoint.others(ours, IDENTITY))[1]


def test_a_foreign_file_is_skipped(tmp_path, capsys):
    from safetensors.torch import save_file

    save(tmp_path, 5)
    save_file({"w": torch.zeros(1)}, tmp_path / "step-000000099.safetensors")
    (tmp_path / "step-000000098.safetensors").write_bytes(b"\x80\x04 a pickle")
    assert checkpoint.latest(tmp_path)[1]["step"] == 5
    assert capsys.readouterr().err.count("damaged") == 2


def test_an_empty_or_missing_folder_is_a_fresh_start(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "none") is None


def test_what_a_killed_process_left_is_deleted(tmp_path):
    part = tmp_path / ".step-000000005.safetensors.12345.tmp"  # as `files.replacing` names it
    part.write_bytes(b"the first ha")
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000005.safetensors"]


@contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: the system answers a write with an error, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_writer_returns_while_it_writes_what_was_there(tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def held(*arguments, save=checkpoint.save):
        begun.set()
        assert go_on.wait(60)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", held)
    writer, w = checkpoint.Writer(tmp_path), torch.ones(1000)
    writer.save(5, {"w": w}, {})
    assert begun.wait(60)
    w.fill_(7)  # training goes on
    writer.check()
    assert checkpoint.newest(tmp_path) is None
    go_on.set()
    writer.wait()
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000000005.safetensors"
    assert torch.equal(checkpoint.latest(tmp_path)[0]["w"], torch.ones(1000))


def test_checkpoints_are_written_one_after_the_other(tmp_path):
    writer = checkpoint.Writer(tmp_path)
    for step in range(1, 6):
        writer.save(step, {"w": torch.full((1000,), float(step))}, {})
    writer.wait()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-000000004.safetensors",
        "step-000000005.safetensors",
    ]
    assert torch.equal(checkpoint.latest(tmp_path)[0]["w"], torch.full((1000,), 5.0))


@pytest.mark.parametrize(
    "ask",
    [
        checkpoint.Writer.wait,
        checkpoint.Writer.check,
        lambda writer: writer.save(6, {"w": torch.ones(1)}, {}),
    ],
    ids=["wait", "check", "save"],
)
def test_what_fails_in_the_thread_is_raised_once(tmp_path, monkeypatch, ask):
    def failing(*_):
        raise UserError("no room")

    monkeypatch.setattr(checkpoint, "save", failing)
    writer = checkpoint.Writer(tmp_path)
    writer.save(5, {"w": torch.ones(1)}, {})
    futures.wait([writer._last], 60)
    with pytest.raises(UserError, match="no room"):
        ask(writer)
    writer.check()
    writer.wait()


def test_without_a_checkpoint_there_is_nothing_to_wait_for(tmp_path):
    writer = checkpoint.Writer(tmp_path)
    writer.check()
    writer.wait()
    assert checkpoint.newest(tmp_path) is None


def fill(folder):
    """Save a small checkpoint and then one of 4 MB; return the error of the second."""
    save(folder, 5)
    writer = checkpoint.Writer(folder)
    writer.save(10, {"w": torch.zeros(1_000_000)}, {})
    with pytest.raises(UserError) as error:
        writer.wait()
    assert [path.name for path in folder.iterdir()] == ["step-000000005.safetensors"]  # no temporary file either
    tensors, metadata = checkpoint.latest(folder)
    assert metadata["step"] == 5
    assert torch.equal(tensors["w"], torch.full((1000,), 5.0))
    return str(error.value)


def test_a_write_that_fails_says_what_is_needed_and_leaves_the_one_before(tmp_path):
    with largest_file(100_000):
        message = fill(tmp_path)
    assert message.startswith(f"{tmp_path}/step-000000010.safetensors cannot be written (File too large): it needs 4,0")
    assert " bytes and " in message
    assert message.endswith(f" are free; make room and run again, to go on from {tmp_path}/step-000000005.safetensors")


@pytest.fixture
def small_disk(tmp_path):
    """A folder with a file system of 64 KB of its own."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system of 64 KB can be mounted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)  # what was loaded may still be mapped


def test_a_full_disk_says_how_full_it_is(small_disk):
    message = fill(small_disk)
    needed, free = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:bytes|are free)", message))
    assert 4_000_000 <= needed < 4_001_000
    assert 0 < free < 64 * 1024
    assert "No space left on device" in message


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "models").write_text("no folder")
    with pytest.raises(
        UserError, match=r"models/resume/step-000000005.safetensors cannot be written \(Not a directory"
    ):
        save(tmp_path / "models/resume", 5)
