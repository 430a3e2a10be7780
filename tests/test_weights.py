import dataclasses
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torchvision import models

from barlow import cli
from barlow.core import files
from barlow.core.weights import save_weights
from barlow.training import model

ROOT = Path(__file__).parent.parent


@pytest.fixture
def encoder(tmp_path, monkeypatch, smoke):
    """`encoder(arch, stem, channels)` writes models/encoder.safetensors, with a projector, and returns the encoder."""
    monkeypatch.chdir(tmp_path)

    def write(arch, stem="imagenet", channels=3):
        torch.manual_seed(0)
        bits = 8 if channels == 3 else 16
        shape = dataclasses.replace(smoke.model, arch=arch, stem=stem, channels=channels, bits=bits)
        mean, std = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) if channels == 3 else ((0.4,), (0.2,))
        views = dataclasses.replace(smoke.views, size=32, mean=mean, std=std)
        encoder = model.FrozenEncoder(shape, views)
        about = {"model": dataclasses.asdict(shape), "views": dataclasses.asdict(views), "version": "1", "data": "d"}
        projector = {"projector.0.weight": torch.ones(2, 2)}
        save_weights(files.ENCODER, encoder.state_dict() | projector, about | {"pretrain": {"epochs": 3}})
        return encoder

    return write


def weights(*arguments):
    return cli.main(["weights", *arguments])


@torch.no_grad()
def representations(network, channels=3):
    images = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(1))
    return network.eval()(images)


@pytest.mark.parametrize("out", ["a.pth", "a.safetensors"])
def test_torchvisions_network_loads_it_strictly(encoder, out):
    wanted = representations(encoder("resnet18").backbone)
    assert weights("--format", "torchvision", "--out", out) == 0
    network = models.resnet18()
    network.load_state_dict(load_file(out) if out.endswith("s") else torch.load(out, weights_only=True), strict=True)
    assert not representations(network).any()  # the classifier is 0
    network.fc = torch.nn.Identity()
    assert torch.equal(representations(network), wanted)


@pytest.mark.parametrize(("arch", "theirs"), [("resnet18", "resnet18"), ("timm:test_vit", "test_vit")])
def test_timms_network_loads_it_strictly(encoder, arch, theirs):
    wanted = representations(encoder(arch).backbone)
    assert weights("--format", "timm") == 0
    sized = {"img_size": 32} if "vit" in theirs else {}
    network = timm.create_model(theirs, num_classes=0, **sized)
    network.load_state_dict(load_file("models/weights/timm/model.safetensors"), strict=True)
    torch.testing.assert_close(representations(network), wanted)
    found = timm.create_model("local-dir:models/weights/timm", pretrained=True, num_classes=0)
    torch.testing.assert_close(representations(found), wanted)
    config = timm.data.resolve_model_data_config(found)
    assert (config["mean"], config["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (config["input_size"], config["interpolation"], config["crop_pct"]) == ((3, 32, 32), "bilinear", 1.0)
    card = Path("models/weights/timm/README.md").read_text()
    assert f"# {theirs}, pretrained by Barlow Twins" in card
    assert "3 epochs" in card


@pytest.mark.parametrize("channels", [1, 2, 5, 6, 16])  # 6: timm would take repeated RGB for granted
@pytest.mark.parametrize("arch", ["resnet18", "timm:test_vit", "timm:test_convnext"])
def test_timms_network_of_other_channels_loads_it(encoder, arch, channels):
    wanted = representations(encoder(arch, channels=channels).backbone, channels)
    assert weights("--format", "timm") == 0
    assert json.loads(Path("models/weights/timm/config.json").read_text())["model_args"]["in_chans"] == channels
    for given in ({}, {"in_chans": channels}):  # the folder's config.json, or the call
        found = timm.create_model("local-dir:models/weights/timm", pretrained=True, num_classes=0, **given)
        torch.testing.assert_close(representations(found, channels), wanted)
    config = timm.data.resolve_model_data_config(found)
    assert [*config["input_size"]] == [channels, 32, 32]
    assert [*config["mean"]] == [0.4] * channels
    assert [*config["std"]] == [0.2] * channels
    card = " ".join(Path("models/weights/timm/README.md").read_text().split())
    assert f"{channels} channels, with values from 0 to 65535" in card
    assert f"by mean {[0.4] * channels} and standard deviation {[0.2] * channels}." in card


def test_torchvision_has_three_channels_only(encoder, capsys):
    encoder("resnet18", channels=5)
    assert weights("--format", "torchvision") == 2
    text = capsys.readouterr().err
    assert "torchvision's resnet18 takes 3 channels, not model.channels=5; write --format timm" in text
    assert text.count("\n") == 1
    assert not Path("models/weights").exists()
    assert weights("--format", "safetensors") == 0
    assert load_file("models/weights/backbone.safetensors")["conv1.weight"].shape == (64, 5, 7, 7)


def test_any_backbone_is_written_as_plain_safetensors(encoder):
    wanted = encoder("resnet10", "stride").backbone.state_dict()
    assert weights("--format", "safetensors") == 0
    found = load_file("models/weights/backbone.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("format_", ["torchvision", "timm"])
@pytest.mark.parametrize(("arch", "stem"), [("resnet10", "imagenet"), ("resnet18", "stride")])
def test_a_network_that_they_do_not_have_is_refused(encoder, capsys, format_, arch, stem):
    encoder(arch, stem)
    assert weights("--format", format_) == 2
    text = capsys.readouterr().err
    assert f"{format_} has no network of model.arch={arch} with model.stem={stem}; train one with" in text
    assert text.count("\n") == 1


def test_another_ending_is_refused(encoder, capsys):
    encoder("resnet18")
    assert weights("--format", "safetensors", "--out", "a.pth") == 2
    assert "--out a.pth is not allowed with --format safetensors; it must have .safetensors" in capsys.readouterr().err


def test_the_guides_programs_run(encoder):
    """docs/weights.md: torchvision's network, a detector, timm's network."""
    trained = encoder("resnet18").backbone
    assert weights("--format", "torchvision") == weights("--format", "timm") == 0
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs/weights.md").read_text(), flags=re.S)
    assert len(programs) == 3
    names = {}
    for program in programs:
        exec(program, names)
    body = names["backbone"].body.state_dict()
    assert all(torch.equal(w, trained.state_dict()[name]) for name, w in body.items())
    [result] = names["detector"].eval()([torch.rand(3, 64, 64)])
    assert {*result} == {"boxes", "labels", "scores"}
    torch.testing.assert_close(representations(names["network"]), representations(trained))
