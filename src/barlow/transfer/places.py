"""Where given weights come from: a file, a version of the registry, or a public name of torchvision or timm."""

from __future__ import annotations

import re
from pathlib import Path

from barlow.core import files
from barlow.core.errors import UserError
from barlow.settings.params import TIMM

TORCHVISION, REGISTRY = "torchvision:", "registry:"


def is_public(weights: str) -> bool:
    """Tell whether the weights are downloaded by name."""
    return weights.startswith((TORCHVISION, TIMM))


def fingerprint(weights: str, key: str, registry: str) -> dict[str, str]:
    """Return the name and, of a file, its SHA-256. A public name says by itself which weights it means.

    Args:
        weights: a path, `registry:v3`, `torchvision:...` or `timm:...`.
        key: the setting that names them, for messages.
        registry: the folder of the registry.

    Raises:
        UserError: there is no such file or version.
    """
    if is_public(weights):
        return {"name": weights}
    return {"name": weights, "sha256": files.sha256(locate(weights, key, registry))}


def locate(weights: str, key: str, registry: str) -> Path:
    """Return the file that holds the weights; a public name is downloaded, once. Arguments as of `fingerprint`.

    Raises:
        UserError: there is no such file, version or name, or the download failed.
    """
    if is_public(weights):
        try:
            fetch = _of_torchvision if weights.startswith(TORCHVISION) else _of_timm
            return fetch(weights.partition(":")[2])
        except KeyError as error:
            raise UserError(f"{key}={weights} is no public name: {error.args[0]}") from None
        except Exception as error:  # each library and each network fails in its own way
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{key}={weights} cannot be downloaded ({text:.160}); give a file instead") from None
    path = Path(weights).expanduser()
    if weights.startswith(REGISTRY):
        name = weights.removeprefix(REGISTRY)
        version = Path(registry, "versions", name)
        if not re.fullmatch(r"v\d+", name) or not version.is_dir():
            known = ", ".join(sorted(found.name for found in version.parent.glob("v*"))) or "none"
            raise UserError(f"{key}={weights} is no version of promote.registry={registry}; it has: {known}")
        path = version
    if (path / "card.json").is_file():  # a version of the registry
        path /= files.ENCODER.name
        if not path.is_file():
            raise UserError(
                f"{key}={weights} keeps no {path.name}: it is older than that, or a classifier; choose another version"
            )
    if not path.is_file():
        raise UserError(
            f"{key}={weights} is no file; write a path, {REGISTRY}v1, {TORCHVISION}ResNet18_Weights.IMAGENET1K_V1 or "
            f"{TIMM}NAME.TAG"
        )
    return path


def _of_torchvision(name: str) -> Path:
    """Download into torch's cache; torchvision's file names carry the start of their SHA-256, which is checked."""
    import torch
    from torchvision.models import get_weight

    try:
        url: str = get_weight(name).url
    except ValueError as error:
        raise KeyError(str(error)) from None
    except KeyError:
        raise KeyError(f"torchvision has no weights {name}") from None
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = torch.hub.HASH_REGEX.search(path.name)
        torch.hub.download_url_to_file(url, str(path), found.group(1) if found else None, progress=False)
    return path


def _of_timm(name: str) -> Path:
    """Download into Hugging Face's cache."""
    import timm
    from huggingface_hub import hf_hub_download

    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise KeyError(str(error)) from None
    if not config or not config.hf_hub_id:
        raise KeyError(f"timm {timm.__version__} has no weights for {name}")
    return Path(hf_hub_download(config.hf_hub_id, config.hf_hub_filename or "model.safetensors"))
