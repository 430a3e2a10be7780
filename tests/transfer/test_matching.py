import copy
import dataclasses

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from barlow.core import files
from barlow.core.errors import UserError
from barlow.training import model
from barlow.transfer import matching


@pytest.fixture
def network(smoke):
    torch.manual_seed(1)
    return model.BarlowTwins(smoke.model, 24)


@pytest.fixture
def other(smoke):
    torch.manual_seed(2)
    return model.BarlowTwins(smoke.model, 24)


def put(tensors, network, tmp_path, params):
    """Write tensors as a file and load them into the network; return the text."""
    path = tmp_path / "a.pth"
    torch.save(tensors, path)
    loaded = matching.load(str(path), "model.weights", params, network.backbone, network.projector)
    assert loaded.source == {"name": str(path), "sha256": files.sha256(path)}
    return loaded.text.removeprefix(f"model.weights={path}: ")


def same(found, wanted):
    found, wanted = found.state_dict(), wanted.state_dict()
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("prefix", ["", "module.", "state_dict.module.encoder_q.", "student.backbone."])
def test_names_are_found_behind_any_prefix(network, other, smoke, tmp_path, prefix):
    tensors = {f"{prefix}{name}": value for name, value in other.backbone.state_dict().items()}
    before = copy.deepcopy(network.projector)
    text = put(tensors, network, tmp_path, smoke)
    assert text == "100.0 % of the backbone's parameters matched, the projector is new, since the file has none"
    assert same(network.backbone, other.backbone)
    assert same(network.projector, before)


def test_of_teacher_and_student_the_teacher_is_taken(network, other, smoke, tmp_path):
    both = {"online": network.backbone.state_dict(), "teacher": other.backbone.state_dict()}
    text = put(copy.deepcopy(both), network, tmp_path, smoke)
    assert same(network.backbone, other.backbone)
    assert "online.conv1.weight" in text


def test_of_equal_ones_every_process_takes_the_same(network, other):
    tensors = {f"encoder_{q}.{name}": w for q in "qk" for name, w in other.backbone.state_dict().items()}
    assert matching.match(tensors, network.backbone).prefix == "encoder_q."


def test_a_checkpoint_of_barlow_twins_brings_its_projector(network, other, smoke, tmp_path):
    tensors = {"model": {f"module.{name}": value for name, value in other.state_dict().items()}}
    assert put(tensors, network, tmp_path, smoke).endswith("matched, the projector too")
    assert same(network, other)
    smaller = model.BarlowTwins(dataclasses.replace(smoke.model, projector=(32, 32)), 24)
    text = put(tensors, smaller, tmp_path, smoke)
    assert "the projector is new, since the file's has other sizes than model.projector" in text
    assert same(smaller.backbone, other.backbone)


def test_what_was_left_out_is_named_with_the_reason(network, other, smoke, tmp_path):
    tensors = other.backbone.state_dict() | {"fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10)}
    tensors["bn1.weight"] = torch.ones(65)
    tensors["bn1.bias"] = torch.ones(64, dtype=torch.int32)
    del tensors["layer1.0.bn1.weight"]
    kept = copy.deepcopy(network.backbone.bn1)
    text = put(tensors, network, tmp_path, smoke)
    for part in (
        "bn1.weight (shape 65 in the file, 64 here)", "bn1.bias (dtype torch.int32)",
        "layer1.0.bn1.weight (not in the file)", "fc.weight, fc.bias (not in the network)",
    ):  # fmt: skip
        assert part in text
    assert torch.equal(network.backbone.bn1.weight, kept.weight)
    assert torch.equal(network.backbone.conv1.weight, other.backbone.conv1.weight)


def test_half_precision_and_double_become_float32(network, other, smoke, tmp_path):
    for dtype in (torch.float16, torch.float64):
        put({name: value.to(dtype) for name, value in other.backbone.named_parameters()}, network, tmp_path, smoke)
        assert network.backbone.conv1.weight.dtype == torch.float32
        torch.testing.assert_close(network.backbone.conv1.weight, other.backbone.conv1.weight, atol=1e-3, rtol=1e-3)


def test_another_stem_is_named(network, smoke, tmp_path):
    file = model.BarlowTwins(dataclasses.replace(smoke.model, stem="imagenet"), 24)
    text = put(file.backbone.state_dict(), network, tmp_path, smoke)
    assert "conv1.weight (shape 64x3x7x7 in the file, 64x3x3x3 here)" in text
    assert "the file's first layer is that of model.stem: imagenet, not of stride" in text


@pytest.mark.parametrize(
    ("channels", "stem", "text"),
    [
        (3, "stride", "takes model.channels: 3, not 5"),
        (1, "small", "takes model.channels: 1, not 5"),
        (3, "imagenet", "takes model.channels: 3, not 5 and is that of model.stem: imagenet, not of stride"),
        (5, "imagenet", "is that of model.stem: imagenet, not of stride"),
    ],
)
def test_other_channels_are_named_and_the_rest_is_taken(smoke, tmp_path, channels, stem, text):
    torch.manual_seed(5)
    file = model.BarlowTwins(dataclasses.replace(smoke.model, channels=channels, stem=stem), 24)
    params = dataclasses.replace(smoke, model=dataclasses.replace(smoke.model, channels=5))
    network = model.BarlowTwins(params.model, 24)
    new = copy.deepcopy(network.backbone.conv1)
    told = put(file.backbone.state_dict(), network, tmp_path, params)
    side = 7 if stem == "imagenet" else 3
    left_out = f"conv1.weight (shape 64x{channels}x{side}x{side} in the file, 64x5x3x3 here)"
    assert told.endswith(f"left out: {left_out}; the file's first layer {text}")
    assert same(network.backbone.conv1, new)
    network.backbone.conv1 = file.backbone.conv1
    assert same(network.backbone, file.backbone)


def test_a_first_layer_of_no_stem_gets_no_advice(network, smoke, tmp_path):
    tensors = network.backbone.state_dict() | {"conv1.weight": torch.ones(32, 3, 3, 3)}
    told = put(tensors, network, tmp_path, smoke)
    assert told.endswith("left out: conv1.weight (shape 32x3x3x3 in the file, 64x3x3x3 here)")


def test_a_file_of_another_architecture_is_refused(network, smoke, tmp_path):
    before = copy.deepcopy(network)
    with pytest.raises(UserError, match=r"only \d+\.\d % of the parameters of model\.arch=resnet10 match") as caught:
        put(timm.create_model("test_vit").state_dict(), network, tmp_path, smoke)
    assert "\n" not in str(caught.value)
    assert same(network, before)


def test_a_file_that_fits_less_than_nine_tenths_is_refused(network, other, smoke, tmp_path):
    counts = [sum(w.numel() for w in part.parameters()) for part in (other.backbone, other.backbone.layer3)]
    share = 1 - counts[1] / counts[0]
    assert 0.7 < share < 0.9
    tensors = {name: value for name, value in other.backbone.state_dict().items() if "layer3" not in name}
    with pytest.raises(UserError, match=rf"only {100 * share:.1f} % of the parameters"):
        put(tensors, network, tmp_path, smoke)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(network, other, smoke, tmp_path, value):
    tensors = copy.deepcopy(other.state_dict())
    tensors["backbone.layer1.0.conv1.weight"][0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"has a NaN or an infinity in layer1\.0\.conv1\.weight"):
        put(tensors, network, tmp_path, smoke)


def test_bytes_and_complex_numbers_are_no_weights(network, other, smoke, tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.complex64):
        tensors = {name: value.to(dtype) for name, value in other.backbone.state_dict().items()}
        with pytest.raises(UserError, match=rf"only 0\.0 % .*\(dtype {dtype}\)"):
            put(tensors, network, tmp_path, smoke)


def test_torchvisions_file_fits_with_its_stem(smoke, tmp_path):
    torch.manual_seed(3)
    oracle = resnet18()
    path = tmp_path / "a.safetensors"
    save_file(oracle.state_dict(), path)
    settings = dataclasses.replace(smoke.model, arch="resnet18", stem="imagenet")
    backbone = model.backbone(settings, 64)
    params = dataclasses.replace(smoke, model=settings)
    text = matching.load(str(path), "extract.weights[0]", params, backbone).text
    assert text == (
        f"extract.weights[0]={path}: 100.0 % of the backbone's parameters matched; "
        "left out: fc.bias, fc.weight (not in the network)"
    )
    oracle.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(backbone.eval()(images), oracle.eval()(images))


def test_positions_of_a_vision_transformer_are_resampled_as_timm_does(smoke, tmp_path):
    torch.manual_seed(4)
    file = timm.create_model("test_vit", img_size=160)
    path = tmp_path / "a.pth"
    torch.save(file.state_dict(), path)
    oracle = timm.create_model("test_vit", img_size=64, num_classes=0)
    cleaned = timm.models.vision_transformer.checkpoint_filter_fn(file.state_dict(), oracle)
    oracle.load_state_dict({name: value for name, value in cleaned.items() if not name.startswith("head")})
    settings = dataclasses.replace(smoke.model, arch="timm:test_vit", stem="imagenet")
    backbone = model.backbone(settings, 64)
    matching.load(str(path), "model.weights", dataclasses.replace(smoke, model=settings), backbone)
    assert same(backbone, oracle)
