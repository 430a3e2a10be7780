"""torchvision's image classification sets as folders of PNG files, downloaded and verified by torchvision."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from barlow.core.errors import UserError
from barlow.core.progress import shown

DOWNLOAD = Path("data/download")  # kept: a download can resume, and a second ingest needs no network
ARCHIVES = (".tar", ".gz", ".tgz", ".zip", ".bz2", ".mat", ".xz")
Arguments = dict[str, dict[str, Any]]  # arguments of the class by the folder to write; with "", ingest draws the splits


def _named(*splits: str) -> Arguments:
    return {split: {"split": split} for split in splits}


_FLAG: Arguments = {"train": {"train": True}, "test": {"train": False}}
_WHOLE: Arguments = {"": {}}
SETS: dict[str, Arguments] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), _FLAG),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"), _WHOLE),
    **dict.fromkeys(("Food101", "GTSRB", "SVHN"), _named("train", "test")),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), _named("train", "val", "test")),
    **dict.fromkeys(("CLEVRClassification", "Imagenette"), _named("train", "val")),
    "Country211": _named("train", "valid", "test"),
    "EMNIST": {split: {"split": "balanced", **flag} for split, flag in _FLAG.items()},
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "STL10": _named("train", "test", "unlabeled"),
}


def check(source: str) -> str:
    """Return the NAME of `torchvision:NAME`; raises a UserError with the nearest names if it is unknown."""
    name = source.removeprefix("torchvision:")
    if name not in SETS:
        by_lower = {known.lower(): known for known in SETS}
        near = [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), by_lower, 3, 0.0)]
        raise UserError(
            f"ingest.source={source} is not a known set; the nearest are {', '.join(near)} (of {len(SETS)})"
        )
    return name


def write(source: str, out: Path) -> None:
    """Download a set and write its images, lossless, to out/<split>/<class>/NNNNN.png.

    Raises:
        UserError: the set is unknown, the download failed, or a package that torchvision needs is not installed.
    """
    from torchvision import datasets

    name = check(source)
    folder, done = DOWNLOAD / name, DOWNLOAD / name / ".done"
    if not done.exists():
        _drop_extracted(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, arguments in SETS[name].items():
        try:
            images = getattr(datasets, name)(root=str(folder), download=True, **arguments)
        except Exception as error:  # URLError, RuntimeError, ImportError and more come through torchvision
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"ingest.source={source} could not be fetched: {reason}; run again to resume") from error
        classes = _class_names(images)
        for i in shown(range(len(images)), f"{name} {split}".strip(), len(images)):
            image, target = images[i]
            labelled = target is not None and int(target) >= 0
            label = classes.get(int(target), str(int(target))) if labelled else "unlabelled"
            path = out / split / label / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, compress_level=1)
    done.touch()


def _class_names(images: Any) -> dict[int, str]:
    """Return a folder name per class number; none if torchvision names no classes or two names would be the same."""
    names = [name if isinstance(name, str) else name[0] for name in getattr(images, "classes", None) or []]
    safe = [name.strip("/").replace("/", "_") for name in names]
    return dict(enumerate(safe)) if len(set(safe)) == len(safe) else {}


def _drop_extracted(folder: Path) -> None:
    """Remove extracted files, which torchvision trusts to be complete even if the extraction was interrupted."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not name.endswith(ARCHIVES):
                Path(parent, name).unlink()
        if not os.listdir(parent):  # noqa: PTH208
            Path(parent).rmdir()
