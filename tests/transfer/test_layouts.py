import dataclasses

import pytest
import timm
import torch
from torchvision import models

from barlow.training import model
from barlow.transfer import layouts

SHAPES = {
    "torchvision": lambda name: models.get_model(name),
    "timm": lambda name: timm.create_model(name, num_classes=0),
}


@pytest.mark.parametrize("arch", layouts.SHARED)
def test_names_and_shapes_are_those_of_torchvision_and_timm(smoke, arch):
    shape = dataclasses.replace(smoke.model, arch=arch, stem="imagenet")
    with torch.device("meta"):
        wanted = {library: create(arch).state_dict() for library, create in SHAPES.items()}
    backbone = model.backbone(shape, 32)
    found = {
        "torchvision": layouts.of_torchvision(backbone, shape),
        "timm": layouts.of_timm(backbone, shape).state_dict(),
    }
    for library, tensors in found.items():
        assert {n: w.shape for n, w in tensors.items()} == {n: w.shape for n, w in wanted[library].items()}


def test_a_pytorch_file_holds_plain_tensors_alone(tmp_path):
    """Not views of others, whose whole storage torch.save would write."""
    path, whole = tmp_path / "a.pth", torch.arange(10_000.0)
    layouts.write(path, {"part": whole[:10], "turned": whole.view(100, 100).T[:2]})
    found = torch.load(path, weights_only=True)
    assert torch.equal(found["part"], whole[:10])
    assert torch.equal(found["turned"], whole.view(100, 100).T[:2])
    assert path.stat().st_size < 5_000
