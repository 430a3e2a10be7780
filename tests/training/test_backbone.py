"""ResNets against torchvision's, models of timm against timm's, from one layer to the exported file."""

import dataclasses
import inspect

import numpy as np
import onnx
import pytest
import timm
import torch
from torchvision import models
from torchvision.transforms import v2

from barlow import evaluate, export, extract, finetune, pretrain
from barlow.core import files, images, webdataset
from barlow.core.errors import UserError
from barlow.core.weights import load_weights
from barlow.encoder.encoder import Encoder
from barlow.evaluation import features, onnx_file
from barlow.training import dry_run, model
from barlow.training.backbone import backbone

pytestmark = pytest.mark.usefixtures("one_thread")
TIMM = ("test_vit", "test_convnext", "mobilenetv3_small_050")
SIZE = 32


def test_resnets_are_torchvisions(smoke, change):
    for arch in ("resnet18", "resnet34", "resnet50"):
        ours = backbone(change(smoke, "model", arch=arch, stem="imagenet").model, 32)
        theirs = getattr(models, arch)()
        theirs.fc = torch.nn.Identity()
        shapes = {name: value.shape for name, value in theirs.state_dict().items()}
        assert {name: value.shape for name, value in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("zero", [False, True])
def test_zero_init_residual_is_torchvisions(smoke, change, arch, zero):
    """The last norm of each residual block starts with a weight of 0, and the block as its shortcut."""
    ours = backbone(change(smoke, "model", arch=arch, stem="imagenet", zero_init_residual=zero).model, 32)
    theirs = getattr(models, arch)(zero_init_residual=zero)
    zeros = [name for name, w in theirs.named_parameters() if name.startswith("layer") and not w.any()]
    assert [name for name, w in ours.named_parameters() if not w.any()] == [
        name for name, w in theirs.named_parameters() if not w.any()
    ]
    assert any(name.endswith("weight") for name in zeros) == zero


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 8), ("small", 32), ("stride", 16)])
def test_stems(smoke, change, stem, size):
    network = backbone(change(smoke, "model", stem=stem).model, 32)
    seen = []
    network.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert seen == [size]


def of_timm(change, smoke, name):
    """The settings of a model of timm for images of SIZE px."""
    return change(change(smoke, "model", arch=f"timm:{name}", stem="imagenet"), "views", size=SIZE)


def oracle(name):
    """timm's own model, with its classifier left out, and its representation."""
    sized = {"img_size": SIZE} if "vit" in name else {}
    network = timm.create_model(name, num_classes=0, **sized)
    return network, lambda pixels: network.forward_head(network.forward_features(pixels), pre_logits=True)


@pytest.mark.parametrize("name", TIMM)
def test_the_representation_of_a_model_of_timm(smoke, change, name):
    torch.manual_seed(0)
    ours = backbone(of_timm(change, smoke, name).model, SIZE).eval()
    theirs, represent = oracle(name)
    theirs.eval().load_state_dict(ours.state_dict())
    pixels = torch.randn(3, 3, SIZE, SIZE)
    assert torch.equal(ours(pixels), represent(pixels))
    assert ours.dim == theirs.head_hidden_size == ours(pixels).shape[1]
    assert [*ours.state_dict()] == [*theirs.state_dict()]


def test_training_draws_nothing_at_random(smoke, change):
    """This model of timm drops paths at random by itself; a run that goes on after a stop could not repeat them."""
    ours = backbone(of_timm(change, smoke, "fasternet_t1").model, SIZE).train()
    pixels = torch.randn(3, 3, SIZE, SIZE)
    assert torch.equal(ours(pixels), ours(pixels))
    theirs = timm.create_model("fasternet_t1", num_classes=0)
    first = theirs(pixels)
    assert any(not torch.equal(theirs(pixels), first) for _ in range(100))  # few paths are dropped, so not each time


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("convnext_ato", "convnext_atto"),
        ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224"),  # that names weights, which are not loaded
    ],
)
def test_a_wrong_name_is_told_with_the_nearest(smoke, change, name, nearest):
    with pytest.raises(
        UserError, match=rf"^model\.arch=timm:{name} is not a model of timm .*; the nearest is timm:"
    ) as e:
        backbone(of_timm(change, smoke, name).model, SIZE)
    assert str(e.value).endswith(f"timm:{nearest}")


@pytest.mark.parametrize(
    ("name", "size", "other"),
    [
        ("vit_tiny_patch16_224", 40, 48),  # timm itself would leave out 8 px
        ("vit_small_patch14_dinov2", 32, 42),
        ("test_convnext", 24, 32),  # nothing is left for the last convolution
        ("halonet_h1", 24, 256),  # no size near
    ],
)
def test_a_size_that_the_network_does_not_take(smoke, change, name, size, other):
    shape = of_timm(change, smoke, name).model
    with pytest.raises(UserError) as error:
        backbone(shape, size)
    assert str(error.value) == f"model.arch=timm:{name} takes no images of views.size={size} px; {other} px would do"
    assert name == "halonet_h1" or backbone(shape, other).dim > 0


def test_the_dry_run_tells_it_too(project, smoke, change):
    lines = dry_run.describe(of_timm(change, smoke, "test_convnext")).splitlines()
    parameters = sum(w.numel() for w in oracle("test_convnext")[0].parameters())
    assert lines[0] == f"model         timm:test_convnext, {parameters:,} parameters"
    with pytest.raises(UserError, match="the nearest is timm:test_convnext"):
        dry_run.describe(of_timm(change, smoke, "test_convnet"))


def test_timm_is_imported_only_for_its_models():
    source = inspect.getsource(inspect.getmodule(backbone))
    assert not [line for line in source.splitlines() if line.startswith(("import timm", "from timm"))]


@pytest.fixture(scope="module", params=TIMM)
def piped(request, tmp_path_factory, small_shards, smoke):
    """The name of a model with which the whole pipeline has run, in the working directory."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "data").mkdir()
    (folder / "data/shards").symlink_to(small_shards)
    new = {
        "model": {"arch": f"timm:{request.param}", "stem": "imagenet", "projector": (32, 32)},
        "views": {"size": SIZE},
        "pretrain": {"epochs": 1, "warmup_epochs": 0, "knn_epochs": 1},
        "finetune": {"draws": 1, "supervised_budget": 0.0},
        "export": {"max_accuracy_loss": 100.0},
    }
    sections = {name: dataclasses.replace(getattr(smoke, name), **values) for name, values in new.items()}
    params = dataclasses.replace(smoke, **sections)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (pretrain, extract, evaluate, finetune, export):
            command.run(params)
        yield request.param


def pictures():
    return [images.decode(sample.data) for sample in webdataset.read(webdataset.tars("test"))]


@pytest.fixture
def wanted(piped, smoke):
    """By timm's model with the pretrained weights, torchvision's resize and normalisation, and numpy's whitening."""
    network, represent = oracle(piped)
    tensors = load_weights(files.ENCODER)[0]
    mean, whitening = (tensors.pop(f"whitening.{name}").double().numpy() for name in ("mean", "weight"))
    backbone = {name.removeprefix("backbone."): w for name, w in tensors.items() if name.startswith("backbone.")}
    network.eval().load_state_dict(backbone)
    resize = v2.Resize((SIZE, SIZE), antialias=True)
    normalise = v2.Normalize(smoke.views.mean, smoke.views.std)
    rows = [resize(torch.tensor(picture).permute(2, 0, 1).float()) for picture in pictures()]
    with torch.no_grad():
        return (represent(torch.stack([normalise(row / 255) for row in rows])).numpy() - mean) @ whitening


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.slow
def test_the_exported_file_embeds_as_timm_does(piped, wanted):
    encoder = Encoder()
    np.testing.assert_allclose(encoder.embed(pictures(), 7), wanted, atol=1e-4 * np.abs(wanted).max())
    odd = [np.zeros((9, 70, 3), np.uint8), np.full((200, 31, 3), 255, np.uint8)]
    assert np.isfinite(encoder.embed(odd)).all()
    assert encoder.metadata["space"] == onnx_file.embedding_space(model.load_encoder()[0])
    assert (files.TRITON / "encoder/1/model.onnx").read_bytes() == files.ONNX.read_bytes()
    assert f"dims: [ {wanted.shape[1]} ]" in (files.TRITON / "encoder/config.pbtxt").read_text()


@pytest.mark.slow
def test_the_features_are_timms_and_were_measured(piped, wanted):
    found = features.load("pretrained", "test").features.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert features.load("random", "test").features.shape == found.shape
    assert 0 <= files.read_json(files.PRETRAINING)["knn_val_top1"] <= 100
    assert files.read_json(files.FINETUNING)["fine_tuned"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("int8", 0.95), ("fp16", 0.9999)])
def test_reduced_files_are_close(piped, wanted, name, least):
    """Before the whitening, which makes errors in weak directions as large as it makes these directions."""
    tensors = load_weights(files.ENCODER)[0]
    mean, colouring = tensors["whitening.mean"].numpy(), np.linalg.inv(tensors["whitening.weight"].double().numpy())
    found = Encoder(files.REDUCED / f"{name}.onnx").embed(pictures())
    assert cosines(found @ colouring + mean, wanted @ colouring + mean).min() > least


@pytest.mark.slow
def test_the_matrices_of_int8_are_8_bit_but_those_after_the_network(piped):
    graph = onnx.load(files.REDUCED / "int8.onnx").graph
    maker = {output: node.op_type for node in graph.node for output in node.output}
    weighted = [node for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    after = [node for node in weighted if {"embedding", "logits"} & {*node.output}]  # the whitening and the head
    assert len(after) == 2
    assert "DequantizeLinear" not in [maker.get(value) for node in after for value in node.input[1:]]
    weighted = [node for node in weighted if node not in after]
    assert len(weighted) >= 13
    assert all(maker[node.input[i]] == "DequantizeLinear" for node in weighted for i in (0, 1))
    whitening = next(4 * tensor.dims[0] ** 2 for tensor in graph.initializer if "whitening.weight" in tensor.name)
    int8, full = (path.stat().st_size - whitening for path in (files.REDUCED / "int8.onnx", files.ONNX))
    assert int8 < 0.5 * full
