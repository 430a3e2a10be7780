import hashlib
from pathlib import Path

import huggingface_hub
import pytest
import torch

from barlow.core import files
from barlow.core.errors import UserError
from barlow.transfer import places


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def version(name, *contents):
    folder = Path("registry/versions", name)
    folder.mkdir(parents=True)
    files.write_json(folder / "card.json", {})
    for content in contents:
        (folder / content).write_bytes(b"weights")
    return folder


def test_a_file_and_a_version_are_found_and_known_by_their_sha256():
    kept = version("v3", "encoder.safetensors") / "encoder.safetensors"
    Path("a.pth").write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    for given, path in {"a.pth": Path("a.pth"), "registry:v3": kept, str(kept.parent): kept}.items():
        assert places.locate(given, "model.weights", "registry") == path
        assert places.fingerprint(given, "model.weights", "registry") == {"name": given, "sha256": sha256}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.pth", r"model\.weights=nowhere\.pth is no file; write a path, registry:v1, torchvision:"),
        ("registry:v9", r"is no version of promote\.registry=registry; it has: v1$"),
        ("registry:../versions/v1", "is no version"),
        ("registry:v1", r"keeps no encoder\.safetensors"),
        ("torchvision:ResNet18", "is no public name: Invalid weight name"),
        (
            "torchvision:ResNet18_Weights.NO_V9",
            r"is no public name: torchvision has no weights ResNet18_Weights\.NO_V9",
        ),
        ("timm:resnet18.nope", r"is no public name: Invalid pretrained tag \(nope\)"),
        ("timm:nope", r"is no public name: Model architecture \(nope\)"),
    ],
)
def test_what_is_not_there_is_named(given, message):
    version("v1", "encoder.onnx")
    with pytest.raises(UserError, match=message):
        places.locate(given, "model.weights", "registry")


def test_torchvisions_files_are_downloaded_once_and_checked(tmp_path, monkeypatch):
    calls = []

    def download(url, path, prefix, progress):
        calls.append((url, prefix))
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    given = "torchvision:ResNet18_Weights.IMAGENET1K_V1"
    for _ in range(2):
        path = places.locate(given, "model.weights", "registry")
    assert path == tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    assert calls == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd")]
    assert places.fingerprint(given, "model.weights", "registry") == {"name": given}


def test_timms_files_come_from_hugging_face(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: f"cache/{repository}/{name}")
    path = places.locate("timm:vit_tiny_patch16_224.augreg_in21k", "model.weights", "registry")
    assert path == Path("cache/timm/vit_tiny_patch16_224.augreg_in21k/model.safetensors")


def test_a_download_that_fails_is_one_line(monkeypatch):
    def download(*_):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"cannot be downloaded \(OSError: no route\); give a file instead$"):
        places.locate("timm:resnet18.a1_in1k", "model.weights", "registry")
