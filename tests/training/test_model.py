import copy
import dataclasses

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torchvision.transforms import v2

from barlow.core.errors import UserError
from barlow.core.weights import save_weights
from barlow.training import model


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
