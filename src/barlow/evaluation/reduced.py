"""int8 and fp16 files of an exported encoder, each written only if it is as good as the float32 one."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from barlow.core import files
from barlow.encoder import quantize
from barlow.encoder.encoder import Encoder
from barlow.evaluation import exported, neighbours
from barlow.evaluation.figures import Precision, Top1
from barlow.settings.params import Evaluate, Export


def reduce(full: Encoder, source: Path, folder: Path, p: Export, evaluate: Evaluate) -> dict[str, Precision]:
    """Write `folder`/int8.onnx and fp16.onnx, each unless `judge` refuses it; return all three precisions.

    `full` is the encoder in `source`. If a file is refused now, its old version is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    embeddings = exported.compared(full)
    same = neighbours.kept(embeddings, embeddings, evaluate.knn_k)
    precisions = {"float32": Precision(_top1(full, evaluate), same, source.stat().st_size, True)}
    for name, make in {"int8": quantize.int8, "fp16": quantize.fp16}.items():
        target = folder / f"{name}.onnx"
        with tempfile.TemporaryDirectory() as temporary:
            made = Path(temporary) / target.name
            make(source, made, p.calibration_images)
            encoder = Encoder(made)
            top1, kept = _top1(encoder, evaluate), exported.compared(encoder)
            common = neighbours.kept(embeddings, kept, evaluate.knn_k)
            fine, reason = judge(precisions["float32"].top1, top1, common, p)
            precisions[name] = Precision(top1, common, made.stat().st_size, fine)
            if fine:
                with files.replacing(target) as whole:
                    shutil.copyfile(made, whole)
            else:
                target.unlink(missing_ok=True)
        print(f"{target}{'' if fine else ' is not written'}: {reason}", flush=True)
    return precisions


def judge(full: Top1 | None, reduced: Top1 | None, kept: float | None, p: Export) -> tuple[bool, str]:
    """Say whether a reduced file may be written, and why: by its accuracy or, without labels, by its neighbours.

    `kept` is the percentage of nearest neighbours in common with float32.
    """
    neighbours = f"it keeps {kept or 0:.1f} % of the nearest neighbours"
    if full and reduced:
        lost = max(full.linear - reduced.linear, full.knn - reduced.knn)
        text = f"it loses {lost:.2f} points, export.max_accuracy_loss={p.max_accuracy_loss:g}; {neighbours}"
        return lost <= p.max_accuracy_loss, text
    if kept is None:
        return False, "there are neither labels nor two images to measure it with"
    return kept >= p.min_neighbours, f"{neighbours}, export.min_neighbours={p.min_neighbours:g}; there are no labels"


def _top1(encoder: Encoder, evaluate: Evaluate) -> Top1 | None:
    top1 = exported.accuracy(encoder, evaluate)
    return top1 and Top1(round(top1.linear, 6), round(top1.knn, 6))
