import os

import pytest
import torch

from barlow import checkpoint


def save(folder, step, mark="same"):
    checkpoint.save(folder, step, {"w": torch.full((1000,), float(step))}, {"fingerprint": mark, "history": []})


def test_the_newest_is_loaded_and_two_are_kept(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000010.safetensors",
        "step-000000015.safetensors",
    ]
    tensors, metadata = checkpoint.latest(tmp_path, "same")
    assert metadata == {"fingerprint": "same", "history": [], "step": 15}
    assert torch.equal(tensors["w"], torch.full((1000,), 15.0))


@pytest.mark.parametrize("kept", [0, 5, 100, 2000])
def test_a_truncated_one_is_skipped_with_a_warning(tmp_path, capsys, kept):
    save(tmp_path, 5)
    save(tmp_path, 10)
    os.truncate(tmp_path / "step-000000010.safetensors", kept)
    assert checkpoint.latest(tmp_path, "same")[1]["step"] == 5
    assert "step-000000010.safetensors is damaged" in capsys.readouterr().err


def test_one_of_another_run_is_not_resumed(tmp_path, capsys):
    save(tmp_path, 5)
    assert checkpoint.latest(tmp_path, "other") is None
    assert "other params, data or code" in capsys.readouterr().err


def test_a_foreign_file_is_skipped(tmp_path, capsys):
    from safetensors.torch import save_file

    save(tmp_path, 5)
    save_file({"w": torch.zeros(1)}, tmp_path / "step-000000099.safetensors")
    (tmp_path / "step-000000098.safetensors").write_bytes(b"\x80\x04 a pickle")
    assert checkpoint.latest(tmp_path, "same")[1]["step"] == 5
    assert capsys.readouterr().err.count("damaged") == 2


def test_an_empty_or_missing_folder_is_a_fresh_start(tmp_path):
    assert checkpoint.latest(tmp_path, "same") is None
    assert checkpoint.latest(tmp_path / "none", "same") is None


def test_clear_keeps_the_folder(tmp_path):
    save(tmp_path / "resume", 5)
    checkpoint.clear(tmp_path / "resume")
    assert list((tmp_path / "resume").iterdir()) == []


def test_the_fingerprint_tells_parts_apart():
    same = checkpoint.fingerprint(model={"arch": "resnet10"}, data="x")
    assert checkpoint.fingerprint(data="x", model={"arch": "resnet10"}) == same
    assert checkpoint.fingerprint(model={"arch": "resnet18"}, data="x") != same
    assert checkpoint.fingerprint(model={"arch": "resnet10"}, data="y") != same
