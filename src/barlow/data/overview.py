"""What ingest understood, as a table of classes and splits, and warnings of what a user may not have meant."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from barlow.data import manifest
from barlow.data.folders import LABELLED_SPLITS
from barlow.settings.params import Ingest

CLASSES = 10  # rows of classes in the table
NAMED = 3  # classes in a warning
WIDTH = 30  # characters of a class's name
MINORITY = (0.05, 0.95)  # share of the images from which, and up to which, they are a population of their own
FEW = 3  # images that are no population yet
FEW_GREYS = 16  # grey values of masks and label maps, at most; photographs have 80 and more


def table(rows: pa.Table) -> list[str]:
    """Return the lines of a table: the number of images by class (the largest first) and split, and their sum."""
    counts = Counter(zip(rows["label"].to_pylist(), rows["split"].to_pylist(), strict=True))
    sizes: Counter[str | None] = Counter()
    for (label, _), n in counts.items():
        sizes[label] += n
    splits = [split for split in manifest.SPLITS if any(split == other for _, other in counts)]
    classes = sorted((label for label in sizes if label is not None), key=lambda label: (-sizes[label], label))
    groups: list[tuple[str, list[str | None]]] = [(label, [label]) for label in classes[:CLASSES]]
    if len(classes) > CLASSES:
        groups.append((f"{len(classes) - CLASSES} more classes", [*classes[CLASSES:]]))
    groups += [("(no label)", [None])] if None in sizes else []
    if len(groups) > 1:
        groups.append(("sum", list(sizes)))
    names = [_short(name) for name, _ in groups]
    width = max(map(len, ["class", *names]))
    lines = [f"  {'class':{width}}" + "".join(f"{split:>10}" for split in splits)]
    for name, (_, labels) in zip(names, groups, strict=True):
        row = [sum(counts[label, split] for label in labels) for split in splits]
        lines.append(f"  {name:{width}}" + "".join(f"{n:10}" for n in row))
    return lines


def warnings(rows: pa.Table, named: list[str], p: Ingest) -> list[str]:
    """Return warnings about labels and about images unlike the rest, one line each.

    Args:
        rows: the manifest's rows, with the column `greys` of the facts.
        named: the splits that the source names.
        p: the settings.
    """
    readable = rows.filter(rows["error"].is_null())
    lines = [*_no_accuracy(readable, named, p), *_masks(readable), *_other_suffixes(readable["path"].to_pylist())]
    return [f"warning: {p.source}{line}" for line in lines]


def _no_accuracy(rows: pa.Table, named: list[str], p: Ingest) -> list[str]:
    """Warn of splits without labels, and of classes that are missing in a split."""
    labelled = rows.filter(rows["label"].is_valid())
    classes: dict[str, set[str]] = defaultdict(set)
    for split, label in zip(labelled["split"].to_pylist(), labelled["label"].to_pylist(), strict=True):
        classes[split].add(label)
    every = set().union(*classes.values())
    if not every:
        return []
    unlabelled = ", or, if there is nothing to classify, set ingest.labels: none"
    fractions = " and ".join(f"ingest.{s}_fraction={getattr(p, f'{s}_fraction'):g}" for s in ("val", "test"))
    lacking = [split for split in LABELLED_SPLITS if not classes[split]]
    if lacking:
        if not named:
            remedy = f"add labelled images, or raise {fractions}{unlabelled}"
        elif lacking == ["test"] and {"val", "test"} <= set(named):
            remedy = "leave the test images without labels out with ingest.exclude; val is then taken as test"
        elif lacking == ["val"]:
            remedy = f"add val to the splits that the source names, or raise {fractions.partition(' ')[0]}{unlabelled}"
        else:
            remedy = f"add {' and '.join(lacking)} to the splits that the source names{unlabelled}"
        return [
            f" has labels, but no labelled image in {' and '.join(lacking)}, so no accuracy will be measured; {remedy}"
        ]
    missing = {split: sorted(every - classes[split]) for split in LABELLED_SPLITS if every - classes[split]}
    if not missing:
        return []
    said = "; ".join(
        f"{len(names)} of {len(every)} classes have no image in {split} ({', '.join(names[:NAMED])}"
        f"{', ...' if len(names) > NAMED else ''})"
        for split, names in missing.items()
    )
    how = "add images" if named else f"add images or raise {fractions}"
    return [f": {said}; {how}, leave the classes out with ingest.exclude{unlabelled}"]


def _masks(rows: pa.Table) -> list[str]:
    """Warn of images with few grey values, as masks and label maps have, among images that have more."""
    few = rows.filter(pc.less_equal(rows["greys"], FEW_GREYS))["path"].to_pylist()
    if not _is_population(len(few), rows.num_rows):
        return []
    return [
        f": {len(few)} of {rows.num_rows} images have at most {FEW_GREYS} grey values, for example {min(few)}: masks? "
        "leave them out with ingest.exclude"
    ]


def _other_suffixes(paths: list[str]) -> list[str]:
    """Warn of a second suffix that occurs in every folder."""
    suffixes: Counter[str] = Counter()
    folders: dict[str, dict[str, str]] = defaultdict(dict)  # by folder: a path by suffix
    for path in paths:
        pure = PurePosixPath(path)
        suffix = {".jpeg": ".jpg", ".tiff": ".tif"}.get(pure.suffix.lower(), pure.suffix.lower())
        suffixes[suffix] += 1
        by = folders[str(pure.parent)]
        by[suffix] = min(by.get(suffix, path), path)
    if len(folders) < 2:
        return []
    everywhere = [suffix for suffix in suffixes if all(suffix in paths for paths in folders.values())]
    most = max(everywhere, key=lambda suffix: (suffixes[suffix], suffix), default="")
    return [
        f": {suffixes[suffix]} of {len(paths)} images are {suffix or 'without a suffix'}, and every folder has some, "
        f"for example {min(by[suffix] for by in folders.values())}: another kind of image? leave them out with "
        "ingest.exclude"
        for suffix in sorted(everywhere)
        if suffix != most and _is_population(suffixes[suffix], len(paths))
    ]


def _is_population(some: int, of: int) -> bool:
    return some >= FEW and MINORITY[0] * of <= some <= MINORITY[1] * of


def _short(name: str) -> str:
    return name if len(name) <= WIDTH else f"{name[: WIDTH - 3]}..."
