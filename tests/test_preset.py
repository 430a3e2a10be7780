import shutil
from pathlib import Path

import pytest
import yaml

from barlow import preset
from barlow.core.errors import UserError
from barlow.settings import loading, strict


@pytest.fixture(autouse=True)
def project(request, tmp_path, monkeypatch):
    root = request.config.rootpath
    shutil.copy(root / "params.yaml", tmp_path)
    shutil.copytree(root / "presets", tmp_path / "presets")
    monkeypatch.chdir(tmp_path)


def comments():
    return [line.partition("#")[2] for line in Path("params.yaml").read_text().splitlines() if "#" in line]


@pytest.mark.parametrize("name", ["smoke", "cifar10", "imagenet"])
def test_a_preset_is_merged_and_valid(name):
    before = strict.read_yaml("params.yaml")
    preset.run(name)
    after, overlay = strict.read_yaml("params.yaml"), strict.read_yaml(f"presets/{name}.yaml")
    loading.load()
    for section, values in before.items():
        for key, value in values.items():
            wanted = overlay.get(section, {}).get(key, value)
            assert after[section][key] == (value | wanted if isinstance(value, dict) else wanted)


def test_what_changed_is_printed_and_comments_stay(capsys):
    before = comments()
    preset.run("cifar10")
    out = capsys.readouterr().out
    assert "pretrain.epochs: 6 -> 1000" in out
    assert "ingest.source: synthetic -> torchvision:CIFAR10" in out
    assert comments() == before
    assert "max_side: null" in Path("params.yaml").read_text()
    preset.run("cifar10")
    assert capsys.readouterr().out == "params.yaml already has every value of cifar10\n"


def test_an_unknown_preset():
    with pytest.raises(UserError, match="preset 'cifar' is not in presets/; there are: cifar10, imagenet, smoke, vit"):
        preset.run("cifar")


def test_a_preset_that_would_break_the_params_changes_nothing(tmp_path):
    before = (tmp_path / "params.yaml").read_bytes()
    (tmp_path / "presets/bad.yaml").write_text(yaml.safe_dump({"pretrain": {"epochs": 0}}))
    with pytest.raises(UserError, match=r"pretrain.epochs=0"):
        preset.run("bad")
    assert (tmp_path / "params.yaml").read_bytes() == before
    assert not list(tmp_path.glob(".params*"))


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        (
            {"data": {"source": "photos"}},
            r"^with presets/mine\.yaml, params\.yaml: data is called ingest now; rename it$",
        ),
        (None, r"presets/mine\.yaml holds no sections"),
        (["epochs"], r"presets/mine\.yaml holds no sections"),
    ],
)
def test_a_preset_of_ones_own_that_does_not_fit_is_named(tmp_path, overlay, message):
    (tmp_path / "presets/mine.yaml").write_text(yaml.safe_dump(overlay))
    with pytest.raises(UserError, match=message):
        preset.run("mine")


def test_imagenets_rate_of_biases_and_decay_are_the_official_ones_on_the_true_gradient():
    """The official loss sums C over its processes by an all-reduce that autograd does not see.

    So a process's gradient is of its own part of C alone, and the mean that DistributedDataParallel takes is 1 / W of
    the global one; the official README trains on 16 GPUs.
    """
    overlay = strict.read_yaml("presets/imagenet.yaml")["pretrain"]
    assert overlay["lr_biases"] == pytest.approx(0.0048 / 16)
    assert overlay["weight_decay"] == pytest.approx(16 * 1e-6)
    assert overlay["lr_weights"] == 0.2


def test_cifar10s_rates_and_decay_are_solo_learns_without_its_scale_of_the_loss():
    overlay = strict.read_yaml("presets/cifar10.yaml")["pretrain"]
    assert overlay["optimizer"] == "larc"
    assert overlay["lr_weights"] == overlay["lr_biases"] == pytest.approx(0.1 * 0.3)
    assert overlay["weight_decay"] == pytest.approx(1e-4 / 0.1)
