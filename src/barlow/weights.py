"""`barlow weights --format FORMAT`: write the trained backbone for another framework (docs/weights.md).

Reads models/encoder.safetensors. Writes, unless --out says otherwise:

torchvision   models/weights/torchvision.pth, a state dict for torchvision.models.resnet18()
timm          models/weights/timm/, a folder as Hugging Face has it, for timm.create_model
safetensors   models/weights/backbone.safetensors, the backbone's tensors by their own names, of any network

No file holds the whitening, which is not part of the backbone, nor the projector.
"""

from __future__ import annotations

from pathlib import Path

from barlow.core.errors import UserError
from barlow.settings import params, strict
from barlow.training import model
from barlow.transfer import layouts

FOLDER = Path("models/weights")
OUT = {
    "torchvision": FOLDER / "torchvision.pth",
    "timm": FOLDER / "timm",
    "safetensors": FOLDER / "backbone.safetensors",
}
ENDINGS = {"torchvision": (".pth", ".safetensors"), "timm": ("",), "safetensors": (".safetensors",)}


def run(format: str, out: str | None = None) -> None:  # noqa: A002, the flag's name
    """Write the weights and print where they are.

    Raises:
        UserError: there is no encoder, the framework has no such network, or `out` has another ending.
    """
    path = Path(out) if out else OUT[format]
    if path.suffix not in ENDINGS[format]:
        wanted = " or ".join(ENDINGS[format]) if format != "timm" else "no ending, since it is a folder"
        raise UserError(f"--out {path} is not allowed with --format {format}; it must have {wanted}")
    encoder, about = model.load_encoder()
    shape = strict.build(params.Model, about["model"], "models/encoder.safetensors", "model")
    views = strict.build(params.Views, about["views"], "models/encoder.safetensors", "views")
    if format == "timm":
        network = layouts.of_timm(encoder.backbone, shape)
        shown = {"name": shape.arch.removeprefix(params.TIMM), "version": about["version"], "data": about["data"]}
        shown |= {"epochs": about["pretrain"]["epochs"], "whitened": "whitened" if shape.whiten else "as it is"}
        layouts.write_folder(path, network, shape, views, shown)
    elif format == "torchvision":
        layouts.write(path, layouts.of_torchvision(encoder.backbone, shape))
    else:
        layouts.write(path, encoder.backbone.state_dict())
    print(f"{path}: the backbone {shape.arch}, for {format}")
