"""The stages' forward passes on a GPU that is not there.

Under FakeTensorMode a tensor has a shape, a type and a device and no numbers. So nothing is computed, and what mixes
devices is refused as CUDA would refuse it. There is no backward pass, which would look for the real device.
"""

import typing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from barlow import extract, finetune, pretrain
from barlow.evaluation import features, probe
from barlow.settings.params import Ablation
from barlow.training import distributed, model
from barlow.training.loss import ablated_loss, barlow_twins_loss, cross_correlation
from barlow.training.optim import LARS

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIXED = r"on the same device|two devices|cuda:0.*cpu|cpu.*cuda:0"


def conversion(self, convert, recurse=True):
    """Stand in for `nn.Module._apply`, which changes a module's tensors where they are, and cannot if they are fake."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(convert(parameter.detach()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = convert(buffer)
    return self


@pytest.fixture
def gpu(monkeypatch):
    """`with gpu:` tensors are fake and may be on CUDA, modules move there, and a backward pass does nothing."""
    monkeypatch.setattr(nn.Module, "_apply", conversion)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    monkeypatch.setattr(distributed, "local_device", lambda device="auto": CUDA)
    # Files and images come from threads and libraries as real CPU tensors; they are taken for fake ones of the CPU.
    return FakeTensorMode(allow_non_fake_inputs=True)


def views(n, size, device=CUDA):
    return torch.zeros(n, 3, size, size, device=device)


# --- pretraining


def test_a_cpu_view_does_not_go_into_a_network_on_a_gpu(gpu, smoke):
    """What all other tests here rely on."""
    with gpu:
        network = model.BarlowTwins(smoke.model, smoke.views.size).to(CUDA)
        with pytest.raises(RuntimeError, match=MIXED):
            network(views(4, 24), views(4, 24, CPU))
        with pytest.raises(RuntimeError, match=MIXED):
            barlow_twins_loss(torch.zeros(4, 8, device=CUDA), torch.zeros(4, 8), 0.1)


def test_two_views_give_embeddings_there(gpu, smoke):
    with gpu:
        network = model.BarlowTwins(smoke.model, smoke.views.size).to(CUDA, memory_format=torch.channels_last)
        z_a, z_b = network(views(4, 24), views(4, 24))
    assert z_a.shape == z_b.shape == (4, network.dim)
    assert z_a.device == z_b.device == CUDA


@pytest.mark.parametrize("ablate", [None, *typing.get_args(Ablation)])
@pytest.mark.parametrize(("n", "dim"), [(16, 64), (64, 16), (2, 1024)], ids=["dual", "direct", "in float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_what_is_measured_of_the_embeddings(gpu, n, dim, dtype, ablate):
    with gpu:
        z_a, z_b = (torch.zeros(n, dim, dtype=dtype, device=CUDA, requires_grad=True) for _ in range(2))
        assert {term.device for term in ablated_loss(z_a, z_b, 0.0051, ablate)} == {CUDA}
        assert cross_correlation(z_a.detach(), z_b.detach()).device == CUDA


def test_a_step_of_lars(gpu, smoke):
    with gpu:
        network = model.BarlowTwins(smoke.model, smoke.views.size).to(CUDA)
        optimizer = LARS(network.parameters(), 0.1)
        for _ in range(2):
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    assert {state["momentum_buffer"].device for state in optimizer.state.values()} == {CUDA}


def test_the_online_knn(gpu, project, smoke, change, monkeypatch):
    """`accuracy` reads a number, of which there are none: its arguments are looked at instead."""
    compared = []
    monkeypatch.setattr(probe, "accuracy", lambda found, labels: compared.append((found == labels).shape) or 50.0)
    with gpu:
        run = SimpleNamespace(
            device=CUDA, step=3, epoch_steps=3, network=model.BarlowTwins(smoke.model, smoke.views.size).to(CUDA)
        )
        assert pretrain.online_knn(run, change(smoke, "pretrain", knn_epochs=1)) == {"knn_val_top1": 50.0}
    assert compared == [(30,)]


# --- frozen features


def test_images_are_resized_on_the_cpu_and_embedded_there(gpu, project, smoke, monkeypatch):
    """CUDA's antialiased resize fails where a side shrinks by more than 94 (pytorch/vision issue 7671)."""
    resized, entered = [], []
    interpolate = functional.interpolate

    def recorded(pixels, *arguments, **options):
        resized.append(pixels.device)
        return interpolate(pixels, *arguments, **options)

    monkeypatch.setattr(functional, "interpolate", recorded)
    with gpu:
        encoder = model.FrozenEncoder(smoke.model, smoke.views).to(CUDA)
        encoder.backbone.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].device))
        split = features.embed(encoder, features.labelled("val"), CUDA)
    assert set(resized) == {CPU}
    assert entered == [CUDA]
    assert (split.features.device, split.features.shape, len(split.keys)) == (CPU, (30, 512), 30)


def test_an_encoder_and_a_device_that_do_not_fit_are_refused(gpu, project, smoke):
    with gpu:
        encoder = model.FrozenEncoder(smoke.model, smoke.views).to(CUDA)
        with pytest.raises(RuntimeError, match=MIXED):
            features.embed(encoder, features.labelled("val"), CPU)


def test_extract(gpu, project, smoke, monkeypatch):
    """The whole stage but for files, and for the views, which DALI would make on the GPU."""
    kept, asked = {}, []

    def twins(tars, views_, batch, seed, device_id):
        asked.append(device_id)
        return ((views(batch, 24), views(batch, 24)) for _ in range(9))

    monkeypatch.setattr(extract, "TwinViews", twins)
    monkeypatch.setattr(model, "load_encoder", lambda: (model.FrozenEncoder(smoke.model, smoke.views), {}))
    monkeypatch.setattr(features, "save", lambda name, splits: kept.update({name: splits}))
    with gpu:
        extract.run(smoke)
    assert asked == [0, 0]
    assert set(kept) == {"pretrained", "random", "pixels"}
    assert {split.features.device for splits in kept.values() for split in splits.values()} == {CPU}
    for name in ("pretrained", "random"):
        assert kept[name]["view_a"].features.shape == kept[name]["view_b"].features.shape == (200, 512)


# --- fine-tuning


def test_finetuning(gpu, project, smoke, change, monkeypatch):
    """From either start, from training to the accuracy; the head reads features that are on the CPU."""
    study, asked, compared = finetune.Study(change(smoke, "finetune", batch_size=16)), [], []

    def single_views(samples, numbers, views_, batch_size, steps, seed, device_id):
        asked.append(device_id)
        return ((views(batch_size, 24), np.arange(batch_size)) for _ in range(steps))

    monkeypatch.setattr(finetune, "single_views", single_views)
    monkeypatch.setattr(probe, "accuracy", lambda found, labels: compared.append((found == labels).shape) or 50.0)
    pretrained = model.FrozenEncoder(smoke.model, smoke.views).backbone.state_dict()
    numbers = SimpleNamespace(numpy=lambda: np.arange(60))  # a fake tensor has none
    with gpu:
        for start in (pretrained, None):
            _, trained = study.best(start, numbers, (0.1, 0.2), 2)
            assert study.top1(trained, "test") == 50.0
            assert trained.encoder.mean.device == trained.encoder.backbone.conv1.weight.device == CUDA
            assert trained.head.weight.device == CPU
    assert asked == [0] * 4
    assert compared == [(30,), (30,), (60,)] * 2
