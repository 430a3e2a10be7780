import copy
import dataclasses
import typing

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch import nn
from torchvision.transforms import v2

from barlow.core.errors import UserError
from barlow.core.weights import save_weights
from barlow.settings.params import Ablation
from barlow.training import model
from barlow.training.loss import ablated_loss


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
    network = model.BarlowTwins(smoke.model, 24)
    a, b = torch.randn(4, 3, 24, 24), 5 * torch.randn(4, 3, 24, 24)
    z_a, z_b = network(a, b)
    torch.testing.assert_close(z_a, network(a, a)[0])
    torch.testing.assert_close(z_b, network(b, b)[1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_timms_batch_norms_keep_their_activation_when_synchronised(device):
    """Where there is one process, nothing changes. (torch's own batch norm for GPUs takes CPU tensors in eval mode.)"""
    torch.manual_seed(0)
    network, images = timm.create_model("test_efficientnet", num_classes=0), torch.randn(4, 3, 32, 32)
    network(images)  # moves the running statistics
    ours = model.synchronised(copy.deepcopy(network), torch.device(device))
    assert not any(type(module) is timm.layers.BatchNormAct2d for module in ours.modules())
    torch.testing.assert_close(ours.eval()(images), network.eval()(images))
    if device == "cpu":
        torch.testing.assert_close(ours.train()(images), network.train()(images), atol=1e-3, rtol=1e-3)
    found, wanted = ours.state_dict(), network.state_dict()
    assert [*found] == [*wanted]
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-4)


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
    save_weights(path, encoder.state_dict(), identity | {"steps": 3})
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


def representations(n=500, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + 5


def fitted(x):
    whitening = model.Whitening(x.shape[1])
    whitening.fit(x)
    return whitening


def test_before_a_fit_nothing_changes():
    x = representations()
    assert torch.equal(model.Whitening(12)(x), x)


def test_distances_are_those_of_scikit_learns_whitened_components():
    x = representations()
    pca = PCA().fit(x.double().numpy())
    variances = pca.explained_variance_ * (len(x) - 1) / len(x)
    theirs = pca.transform(x.double().numpy()) / np.sqrt(variances + model.SHRINKAGE * variances.mean())
    ours = fitted(x)(x).double()
    torch.testing.assert_close(
        torch.cdist(ours, ours), torch.cdist(*[torch.from_numpy(theirs)] * 2), rtol=1e-4, atol=1e-4
    )


def test_the_matrix_is_symmetric_and_directions_keep_their_order():
    whitening, x = fitted(representations()), representations()
    torch.testing.assert_close(whitening.weight, whitening.weight.T)
    values = torch.linalg.eigvalsh(torch.cov(whitening(x).T, correction=0).double())
    assert (values > 0).all()
    assert values.max() < 1


def test_fewer_images_than_dimensions():
    x = representations(n=5)
    assert fitted(x)(x).isfinite().all()


def test_equal_representations_only_lose_their_mean():
    x = torch.full((7, 3), 2.5)
    assert torch.equal(fitted(x)(x), torch.zeros(7, 3))


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
    network = model.synchronised(model.BarlowTwins(smoke.model, smoke.views.size), torch.device("cpu"))
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
