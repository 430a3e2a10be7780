"""What the folders of a source mean: splits and classes. Where their names are ambiguous, ingest stops and asks.

Understood are <class>/..., <split>/... and <split>/<class>/... . Images in unlabelled/ have no label.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from barlow.core.errors import UserError

Folder = tuple[str, ...]  # the parts of its path, relative to the source
Meaning = tuple[str | None, str | None]  # split and label
SPLIT_WORDS = {
    "pretrain": "pretrain",
    "pretraining": "pretrain",
    "train": "train",
    "training": "train",
    "trn": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
    "tst": "test",
}
FILLERS = {
    "set",
    "data",
    "dataset",
    "split",
    "seg",
    "cls",
    "image",
    "images",
    "img",
    "imgs",
    "photos",
    "pictures",
    "jpg",
}
UNLABELLED = ("unlabelled", "unlabeled")
UNKNOWN: Meaning = ("pretrain", None)
LABELLED_SPLITS = ("train", "val", "test")
SHOWN = 4  # folders in a message
LIST = "list the images in a .csv file with the columns path, split and label"


class Layout(NamedTuple):
    """What the folders of a source mean."""

    meanings: dict[Folder, Meaning]
    notes: list[str]


def split_of(name: str) -> str | None:
    """Return the split that a name stands for, such as `test` for "Testing", "test_images" or "seg_test"; else None."""
    words = [word for word in _words(name) if word not in FILLERS]
    return SPLIT_WORDS.get(words[0]) if len(words) == 1 else None


def _words(name: str) -> list[str]:
    words = re.sub(r"[^a-z]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()).split()
    return [word.removesuffix("set") if word.removesuffix("set") in SPLIT_WORDS else word for word in words]


def understand(folders: Iterable[Folder], source: str, labels: str) -> Layout:
    """Return the split and the label of the images in each folder.

    Args:
        folders: the folders that hold images themselves.
        source: `ingest.source`, for messages.
        labels: `ingest.labels`.

    Raises:
        UserError: the names of the folders are ambiguous. The message names two ways to say what is meant.
    """
    folders = sorted(set(folders))
    unlabelled = {folder: UNKNOWN for folder in folders if folder and folder[0].lower() in UNLABELLED}
    if labels == "classes":
        return Layout({folder: (None, folder[0] if folder else None) for folder in folders} | unlabelled, [])
    top = list(dict.fromkeys(folder[0] for folder in folders if folder and folder[0].lower() not in UNLABELLED))
    splits = {name: split for name in top if (split := split_of(name))}
    doubled = {name for name in splits if _is_doubled(name, folders)}
    if labels == "folders":
        _require_no_wrapper(folders, source)
        if splits and len(splits) < len(top):
            _stop_at_mixed(top, splits, source)
        if not splits:
            _require_no_split_within(top, source)
        _require_no_split_below(folders, splits, doubled, source)
    elif len(splits) < len(top):  # without labels only the plain names are splits beside other folders
        splits = {name: split for name, split in splits.items() if name.lower() in SPLIT_WORDS}
    meanings = {folder: _meaning(folder, splits, doubled) for folder in folders} | unlabelled
    renamed = [f"{name} = {split}" for name, split in splits.items() if name.lower() != split]
    return Layout(meanings, [f"folders taken as splits: {', '.join(renamed)}"] if renamed else [])


def _meaning(folder: Folder, splits: dict[str, str], doubled: set[str]) -> Meaning:
    split = splits.get(folder[0]) if folder else None
    if split is None:
        return None, folder[0] if folder else None
    inner = folder[2:] if folder[0] in doubled else folder[1:]
    if split == "pretrain" or not inner or inner[0].lower() in UNLABELLED:
        return split, None
    return split, inner[0]


def _is_doubled(top: str, folders: list[Folder]) -> bool:
    """Tell whether a split's folder holds nothing but itself again, like seg_train/seg_train, as some archives do."""
    below = {folder[1:2] for folder in folders if folder[:1] == (top,)}
    return len(below) == 1 and below != {()} and split_of(min(below)[0]) == split_of(top)


def _require_no_wrapper(folders: list[Folder], source: str) -> None:
    """Stop if one folder holds all others: its name would be the only label, and the real ones would be lost."""
    folders = [folder for folder in folders if not folder or folder[0].lower() not in UNLABELLED]
    common: Folder = ()
    for names_at_depth in zip(*folders, strict=False):
        if len(set(names_at_depth)) > 1:
            break
        common += names_at_depth[:1]
    names = sorted({folder[len(common)] for folder in folders if len(folder) > len(common)})
    if not common or common in folders or split_of(common[0]):
        return
    inner = "/".join((source.rstrip("/"), *common))
    if any(map(split_of, names)):
        raise UserError(
            f"ingest.source={source}: the splits {_shown(names)} lie in {'/'.join(common)}/; set ingest.source to "
            f"{inner}, or {LIST}"
        )
    if len(names) > 1:
        raise UserError(
            f"ingest.source={source}: all images lie in {'/'.join(common)}/, so its name is no label. If the folders "
            f"in it are classes ({_shown(names)}), set ingest.source to {inner}; if there are no labels, set "
            "ingest.labels: none"
        )


def _stop_at_mixed(top: list[str], splits: dict[str, str], source: str) -> None:
    others = [name for name in top if name not in splits]
    raise UserError(
        f"ingest.source={source}: {_shown(splits)} {'is' if len(splits) == 1 else 'are'} named like a split, but "
        f"{_shown(others)} beside {'it' if len(splits) == 1 else 'them'} {'is' if len(others) == 1 else 'are'} not. If "
        f"all of them are classes, set ingest.labels: classes; if not, leave {_shown(others)} out with ingest.exclude, "
        f"or {LIST}"
    )


def _require_no_split_within(top: list[str], source: str) -> None:
    """Stop at names that hold different splits and something else: trainA and testA, train_cats and test_cats."""
    within = {name: {SPLIT_WORDS[word] for word in _words(name) if word in SPLIT_WORDS} for name in top}
    if len(set().union(*within.values())) > 1:
        raise UserError(
            f"ingest.source={source}: {_shown(name for name in top if within[name])} have a split in their names, and "
            f"something else. If they are classes, set ingest.labels: classes; if they are splits, {LIST}"
        )


def _require_no_split_below(folders: list[Folder], splits: dict[str, str], doubled: set[str], source: str) -> None:
    """Stop if a folder below the top is named like a split.

    A class may be called `test`, if all splits have it: train/control, train/test, test/control, test/test.
    """
    for folder in folders:
        if not folder or folder[0].lower() in UNLABELLED or splits.get(folder[0]) == "pretrain":
            continue
        if folder[0] not in splits:
            if deep := [i for i, name in enumerate(folder) if i and split_of(name)]:
                raise UserError(
                    f"ingest.source={source}: {'/'.join(folder[: deep[0] + 1])} is named like a split, below a folder "
                    f"that is not. If {folder[0]} is a class, and folders in it mean nothing, set ingest.labels: "
                    f"classes; if it is a split, {LIST}"
                )
        elif len(folder) > 1 and split_of(folder[1]) and folder[0] not in doubled:
            with_it = {other[0] for other in folders if other[1:2] == folder[1:2]}
            if with_it != {name for name, split in splits.items() if split in LABELLED_SPLITS} or len(with_it) < 2:
                raise UserError(
                    f"ingest.source={source}: {'/'.join(folder[:2])} is named like a split, below another split. If "
                    f"{folder[1]} is a split, move it up; if it is a class, {LIST}"
                )


def _shown(names: Iterable[str]) -> str:
    first = [f"{name}/" for name in names]
    more = f" and {len(first) - SHOWN} more" if len(first) > SHOWN else ""
    return ", ".join(first[:SHOWN]) + more
