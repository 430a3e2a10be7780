import copy
import dataclasses
import typing

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.transforms import v2

from barlow.core.errors import UserError
from barlow.core.weights import save_weights
from barlow.settings.params import Ablation
from barlow.training import model
from barlow.training.loss import ablated_loss


def test_resnets_are_torchvisions(smoke):
    for arch in ("resnet18", "resnet34", "resnet50"):
        ours = model.backbone(dataclasses.replace(smoke.model, arch=arch, stem="imagenet"))
        theirs = getattr(models, arch)()
        theirs.fc = torch.nn.Identity()
        shapes = {name: value.shape for name, value in theirs.state_dict().items()}
        assert {name: value.shape for name, value in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("zero", [False, True])
def test_zero_init_residual_is_torchvisions(smoke, arch, zero):
    """The last norm of each residual block starts with a weight of 0, and the block as its shortcut."""
    ours = model.backbone(dataclasses.replace(smoke.model, arch=arch, stem="imagenet", zero_init_residual=zero))
    theirs = getattr(models, arch)(zero_init_residual=zero)
    zeros = [name for name, w in theirs.named_parameters() if name.startswith("layer") and not w.any()]
    assert [name for name, w in ours.named_parameters() if not w.any()] == [
        name for name, w in theirs.named_parameters() if not w.any()
    ]
    assert any(name.endswith("weight") for name in zeros) == zero


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 8), ("small", 32), ("stride", 16)])
def test_stems(smoke, stem, size):
    network = model.backbone(dataclasses.replace(smoke.model, stem=stem))
    seen = []
    network.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert seen == [size]


def test_projector_has_no_bias_and_ends_linear():
    layers = model.projector(10, (7, 6, 5))
    assert [type(layer).__name__ for layer in layers] == [
        *("Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"),
    ]
    assert all(layer.bias is None for layer in layers if isinstance(layer, torch.nn.Linear))
    assert layers(torch.randn(4, 10)).shape == (4, 5)
    assert len(model.projector(10, (5,))) == 1


def test_views_are_normalised_apart(smoke):
    """Batch norm sees one view at a time, as in the official code: each embedding is that of its view alone."""
    torch.manual_seed(0)
    network = model.BarlowTwins(smoke.model)
    a, b = torch.randn(4, 3, 24, 24), 5 * torch.randn(4, 3, 24, 24)
    z_a, z_b = network(a, b)
    torch.testing.assert_close(z_a, network(a, a)[0])
    torch.testing.assert_close(z_b, network(b, b)[1])


@pytest.mark.parametrize(("height", "width"), [(24, 24), (70, 41), (10, 200)])
def test_preprocess_equals_torchvision(smoke, height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = smoke.views.size
    oracle = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((size, size), antialias=True),
            v2.Normalize(smoke.views.mean, smoke.views.std),
        ]
    )
    encoder = model.FrozenEncoder(smoke.model, smoke.views)
    ours = encoder.preprocess(torch.from_numpy(pixels)[None])[0]
    torch.testing.assert_close(ours, oracle(Image.fromarray(pixels)), atol=1e-4, rtol=1e-4)


def test_an_encoder_is_rebuilt_from_its_file_alone(smoke, tmp_path):
    encoder = model.FrozenEncoder(smoke.model, smoke.views)
    path = tmp_path / "encoder.safetensors"
    identity = {"model": dataclasses.asdict(smoke.model), "views": dataclasses.asdict(smoke.views)}
    save_weights(path, encoder.backbone.state_dict(), identity | {"steps": 3})
    loaded, metadata = model.load_encoder(path)
    images = torch.randint(0, 256, (2, 30, 20, 3), dtype=torch.uint8)
    assert torch.equal(loaded(images), encoder(images))
    assert metadata["steps"] == 3


def test_an_encoder_of_an_older_version_is_refused_by_name(smoke, tmp_path):
    older = dataclasses.asdict(smoke.model)
    del older["zero_init_residual"]
    path = tmp_path / "encoder.safetensors"
    save_weights(path, {}, {"model": older, "views": dataclasses.asdict(smoke.views)})
    with pytest.raises(UserError, match=r"encoder\.safetensors: model\.zero_init_residual is missing"):
        model.load_encoder(path)


def test_bf16_is_as_asked():
    cpu = torch.device("cpu")
    assert model.computes_bf16("bf16", cpu)
    assert not model.computes_bf16("fp32", cpu)


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True), (True, True)])
def test_bf16_is_automatic_where_the_processor_has_it(monkeypatch, avx512, amx):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert model.computes_bf16("auto", torch.device("cpu")) == (avx512 or amx)


@pytest.mark.parametrize(
    ("held", "native"),
    [
        *[(name, False) for name in ("SSE41", "AVX2", "avx2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")],
        *[
            (name, True)
            for name in ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_1_512", "DEFAULT")
        ],
    ],
)
def test_bf16_is_not_automatic_where_onednn_would_emulate_it(monkeypatch, held, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    assert model.computes_bf16("auto", torch.device("cpu")) is native


class Twins(nn.Module):
    """A small network of the form of BarlowTwins; `inner` is in its backbone, batch norm in its projector."""

    def __init__(self, *inner):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 12), *inner)
        self.projector = model.projector(12, (10, 6))

    def forward(self, view_a, view_b):
        return self.projector(self.backbone(view_a)), self.projector(self.backbone(view_b))


def twins(*inner):
    torch.manual_seed(0)
    return Twins(*inner), [torch.randn(12, 3, 6, 6) for _ in range(2)]


def step(network, embed, views, ablate=None, bf16=False):
    """Return the embeddings, the gradients and the buffers after one forward and backward pass."""
    torch.manual_seed(1)  # for dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        z_a, z_b = embed(*views)
    ablated_loss(z_a, z_b, 0.1, ablate).total.backward()
    return [z_a, z_b], [w.grad for w in network.parameters()], list(network.buffers())


def with_graph(network, size):
    """Return what embeds microbatch for microbatch, each with its own autocast, and keeps all activations."""

    def embed(*views):
        for view in views:
            parts = []
            for i in range(0, len(view), size):
                parts.append(network.backbone(view[i : i + size]))
                torch.clear_autocast_cache()
            yield network.projector(torch.cat(parts))

    return embed


@pytest.mark.parametrize("ablate", [None, *typing.get_args(Ablation)])
@pytest.mark.parametrize("size", [2, 4, 5, 12])
def test_microbatches_have_the_loss_and_gradient_of_the_whole_batch(size, ablate):
    """Where the backbone has no batch norm, to the rounding of float64; the last microbatch may be smaller."""
    network, views = twins(nn.LayerNorm(12), nn.GELU())
    whole, network = network.double(), copy.deepcopy(network).double()
    views = [view.double() for view in views]
    expected = step(whole, whole, views, ablate)
    found = step(network, model.Microbatches(network, size), views, ablate)
    for ours, theirs in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert all(gradient.any() for gradient in found[1])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("ablate", [None, "stop-gradient"])
def test_both_passes_are_the_same_and_statistics_are_counted_once(ablate, bf16):
    """Dropout, batch norm and bf16, to the bit: as if the activations of each microbatch had been kept."""
    network, views = twins(nn.BatchNorm1d(12), nn.Dropout(0.5))
    kept = copy.deepcopy(network)
    found = step(network, model.Microbatches(network, 4), views, ablate, bf16)
    random_state = torch.get_rng_state()
    expected = step(kept, with_graph(kept, 4), views, ablate, bf16)
    assert torch.equal(torch.get_rng_state(), random_state)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
    assert dict(network.named_buffers())["backbone.4.num_batches_tracked"] == 6  # of two views of three microbatches


def test_microbatches_of_a_resnet_are_as_if_all_activations_were_kept(smoke):
    """Through torch's convolutions in channels_last, and batch norm over all processes."""
    torch.manual_seed(0)
    network = model.synchronised(model.BarlowTwins(smoke.model), torch.device("cpu"))
    network = network.to(memory_format=torch.channels_last)
    views = [torch.randn(8, 3, 24, 24).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    kept = copy.deepcopy(network)
    found = step(network, model.Microbatches(network, 4), views)
    for ours, theirs in zip(found, step(kept, with_graph(kept, 4), views), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


def test_no_more_than_a_microbatch_is_in_the_backbone_and_no_activation_of_it_is_kept():
    network, views = twins(nn.LayerNorm(12))
    sizes, kept = [], []
    network.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    network.projector = nn.Identity()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        z_a, z_b = model.Microbatches(network, 4)(*views)
    assert sizes == [4] * 6  # one view at a time
    assert sum(kept) == sum(view.numel() for view in views)  # they are the input of the second pass
    ablated_loss(z_a, z_b, 0.1, None).total.backward()
    assert sizes == [4] * 12
