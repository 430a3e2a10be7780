import torch

from barlow.core.weights import save_weights


def test_weights_files_are_deterministic(tmp_path):
    for name in "ab":
        save_weights(tmp_path / name, {"x": torch.arange(3), "w": torch.ones(2, 2).T}, {"b": 1, "a": [2]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
