"""`python benchmarks/labelfree.py FOLDER`: do label-free figures rank checkpoints as the linear probe does?

FOLDER has train/CLASS/*.jpg and test/CLASS/*.jpg (CIFAR-10 as JPEG files). A few runs, most of them wrong in some way,
keep several checkpoints each, and each checkpoint is evaluated as `barlow evaluate` does it. The script prints
Spearman's rank correlation of each label-free figure with the probe: over all checkpoints, over runs, and over time.
"""

import os
import sys
import tempfile
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from barlow import evaluate, extract, ingest, shard, validate
from barlow.core import provenance, webdataset
from barlow.evaluation import features
from barlow.settings import params, strict
from barlow.training import model
from barlow.training.loss import barlow_twins_loss
from barlow.training.state import Training

EACH = {"train": 1000, "test": 200}  # images per class
EPOCHS = (2, 5, 10)  # after which a run is evaluated
CROP_ALONE = {"jitter": 0.0, "grayscale": 0.0, "solarize": (0.0, 0.0), "flip": 0.0}
RUNS = {
    "as it should be": {},
    "crop alone": {"views": CROP_ALONE},
    "no crop": {"views": {"crop_area": (1.0, 1.0)}},
    "no redundancy reduction": {"pretrain": {"lambd": 0.0}},
    "lambda 100 times larger": {"pretrain": {"lambd": 0.2}},
    "learning rate 10 times smaller": {"pretrain": {"lr_weights": 0.06}},
    "learning rate 10 times larger": {"pretrain": {"lr_weights": 6.0}},
    "32 dimensions": {"model": {"projector": (512, 512, 32)}},
}
FIGURES = ("effective_rank", "std", "correlation", "alignment", "uniformity", "loss")
CPU = torch.device("cpu")


def settings(folder: Path) -> params.Params:
    document = strict.read_yaml(Path(__file__).parent.parent / "params.yaml")
    built = strict.build(params.Params, document, "params.yaml")
    views = replace(built.views, crop_area=(0.2, 1.0), grayscale=0.2, blur=(0.0, 0.0))
    return replace(
        built,
        ingest=replace(built.ingest, source=str(folder)),
        validate=replace(built.validate, max_duplicate_fraction=0.1),
        views=views,
        pretrain=replace(built.pretrain, epochs=max(EPOCHS)),
        evaluate=replace(built.evaluate, draws=0),
    )


def changed(base: params.Params, changes: dict) -> params.Params:
    return replace(base, **{name: replace(getattr(base, name), **values) for name, values in changes.items()})


def look(backbone: torch.nn.Module, p: params.Params) -> dict[str, float]:
    """Evaluate as the stages do; accuracies in percent, and label-free figures."""
    encoder = model.FrozenEncoder(p.model, p.views)
    encoder.backbone.load_state_dict(backbone.state_dict())
    splits = {name: features.embed(encoder, features.labelled(name), CPU) for name in ("train", "val", "test")}
    features.save("pretrained", splits | extract.health(encoder, p, CPU))
    scores = evaluate.score(splits, len(webdataset.classes()), p.evaluate, "pretrained").scores
    return {"top1": scores.linear.top1, "knn": scores.knn.top1, **asdict(evaluate.measure_health("pretrained"))}


def checkpoints(name: str, p: params.Params, common: params.Params):
    """Train, and yield one row per checkpoint; all checkpoints are measured on the same views."""
    run, bf16 = Training(p, CPU), model.computes_bf16("auto", CPU)
    for epoch in range(1, p.pretrain.epochs + 1):
        loss = 0.0
        for view_a, view_b in run.views:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                z_a, z_b = run.twins(view_a, view_b)
            terms = barlow_twins_loss(z_a, z_b, p.pretrain.lambd)
            run.update(terms)
            run.record(terms, z_a, z_b)
            loss += float(terms.total.detach()) / run.epoch_steps
        if epoch in EPOCHS:
            yield {"run": name, "epoch": epoch, "loss": loss} | look(run.network.backbone, common)


def ranks(rows: list[dict], figure: str) -> str:
    """Return Spearman's correlation with the probe: pooled, between runs at the end, and the median within runs."""

    def rho(some: list[dict]) -> float:
        return float(spearmanr([row[figure] for row in some], [row["top1"] for row in some]).statistic)

    rng = np.random.default_rng(0)
    names = list(RUNS)
    resampled = []
    for _ in range(1000):  # resample whole runs, since the checkpoints of one run are alike
        drawn = rng.choice(names, len(names))
        resampled.append(rho([row for name in drawn for row in rows if row["run"] == name]))
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    last = [row for row in rows if row["epoch"] == max(EPOCHS)]
    within = [rho(list(group)) for _, group in groupby(rows, lambda row: row["run"])]
    return (
        f"| {figure} | {rho(rows):+.2f} ({low:+.2f} to {high:+.2f}) | {rho(last):+.2f} | {np.nanmedian(within):+.2f} |"
    )


def main(source: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for split, count in EACH.items():
            for category in sorted((source / split).iterdir()):
                (Path("images") / split / category.name).mkdir(parents=True)
                for path in sorted(category.iterdir())[:count]:
                    (Path("images") / split / category.name / path.name).symlink_to(path)
        base = settings(Path("images").resolve())
        for stage in (ingest, validate, shard):
            stage.run(base)
        rows = []
        for name, changes in RUNS.items():
            for row in checkpoints(name, changed(base, changes), base):
                rows.append(row)
                print(
                    "  ".join(f"{key} {value:.3g}" if key != "run" else value for key, value in row.items()), flush=True
                )
    print(f"\n{provenance.hardware()}; {len(rows)} checkpoints of {len(RUNS)} runs")
    print("| checkpoint after epochs | " + " | ".join(map(str, EPOCHS)) + " |\n|---|" + "---|" * len(EPOCHS))
    for name, group in groupby(rows, lambda row: row["run"]):
        print(f"| {name} | " + " | ".join(f"{row['top1']:.1f}" for row in group) + " |")
    print("\n| figure | all checkpoints | runs, at the end | time, median run |\n|---|---|---|---|")
    for figure in FIGURES:
        print(ranks(rows, figure))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main(Path(sys.argv[1]).resolve())
