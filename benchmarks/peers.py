"""`python benchmarks/peers.py --data FOLDER ... --cpu-seconds 720`: our recipe beside lightly's and solo-learn's.

Each recipe of `recipes.py` trains the network of params.yaml on the same images for the same time, and each encoder is
judged by the project's probe and kNN, beside a random encoder and pixels. `make peers` installs lightly into
.venv-peers, which this script finds by itself; without lightly its rows are left out.

Data: folders of train/CLASS, test/CLASS and perhaps val/CLASS or validation/CLASS; `digits` (scikit-learn's, 32 px);
`synthetic` (the embedded set). They go through ingest, validate and shard, and all recipes read the shards.

Time: `--minutes` by the clock, or `--cpu-seconds` of processor time, user and system, of the process and its data
workers, which other load does not distort as much. A recipe's first steps are timed and thrown away, so the number of
steps is known before the run, for the cosine; the table has the time that was really taken. Loading and distorting
images counts; evaluation does not. `--steps` fixes the steps instead. Each run has a process of its own.

Rows go to `--out`, one JSON object per line, and what has a row is not run again: an interrupted call goes on. Without
`--data` the tables of the rows are printed, and nothing runs. Intervals are 95 %, over seeds and test images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".venv-peers"  # from `make peers`
BASELINES = ("random encoder", "pixels")
METHODS = ("ours", "lightly", "solo-learn", *BASELINES)
SPLITS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}  # by the names of their folders
SKIPPED, TIMED = 3, 20  # steps before the run: not timed, and timed
KINDS = ("linear", "knn", "knn_whitened")
Row = dict[str, Any]


def prepare(source: str, document: Row, caps: dict[str, int | None]) -> None:
    """Make data/shards of a source in the working folder, and a params.yaml for it."""
    from barlow import ingest, shard, validate
    from barlow.settings import loading

    if source != "synthetic":
        folders = digits() if source == "digits" else split_folders(Path(source))
        for split, folder in folders.items():
            link(folder, Path("images") / split, caps.get(split))
        document["ingest"] |= {"source": str(Path("images").resolve()), "labels": "folders"}
        document["validate"]["max_duplicate_fraction"] = max(document["validate"]["max_duplicate_fraction"], 0.1)
    else:
        document["ingest"]["source"] = source
    Path("params.yaml").write_text(yaml.safe_dump(document))
    p = loading.load()
    for stage in (ingest, validate, shard):
        stage.run(p)


def split_folders(source: Path) -> dict[str, Path]:
    found = {split: source / name for split, names in SPLITS.items() for name in names if (source / name).is_dir()}
    if not {"train", "test"} <= found.keys():
        sys.exit(f"--data {source}: there must be a folder train/ and a folder test/, with a folder per class in each")
    return found


def digits() -> dict[str, Path]:
    """Write scikit-learn's digits as PNG files of 32 px: 1,347 to train, 450 to test."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    parts = train_test_split(range(len(data.target)), stratify=data.target, test_size=0.25, random_state=0)
    folders = {"train": Path("digits/train").resolve(), "test": Path("digits/test").resolve()}
    for folder, numbers in zip(folders.values(), parts, strict=True):
        for i in numbers:
            path = folder / str(data.target[i]) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((data.images[i] * 255 / 16).round().astype(np.uint8))
            image.resize((32, 32), Image.Resampling.BILINEAR).save(path)
    return folders


def link(source: Path, target: Path, cap: int | None) -> None:
    """Link the images of a split, at most `cap`, with the same share of each class."""
    classes = {folder.name: sorted(folder.iterdir()) for folder in sorted(source.iterdir()) if folder.is_dir()}
    share = min((cap or math.inf) / sum(map(len, classes.values())), 1)
    rng = np.random.default_rng(0)
    for name, paths in classes.items():
        (target / name).mkdir(parents=True)
        for i in rng.permutation(len(paths))[: max(round(share * len(paths)), 1)]:
            (target / name / paths[i].name).symlink_to(paths[i].resolve())


class Clock:
    """Seconds, by the clock and of processors, since it was made: of this process and its workers, without pauses."""

    def __init__(self) -> None:
        self._start = self._now()

    def _now(self) -> tuple[float, float, float]:
        import psutil

        reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
        workers = reaped.ru_utime + reaped.ru_stime
        for child in psutil.Process().children(recursive=True):
            try:
                workers += sum(child.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        return time.perf_counter(), time.process_time(), workers

    def read(self) -> dict[str, float]:
        seconds, own, workers = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return {"seconds": seconds, "cpu_seconds": own + workers}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what this process does here; workers go on, and prepare batches of the training."""
        before = self._now()
        yield
        now = self._now()
        self._start = (self._start[0] + now[0] - before[0], self._start[1] + now[1] - before[1], self._start[2])


def steps_within(recipe: Any, p: Any, budget: dict[str, float], batch_size: int | None) -> int:
    """Return how many steps fit into the budget, by the speed of some that are thrown away."""
    if "steps" in budget:
        return int(budget["steps"])
    ((unit, limit),) = budget.items()
    run = recipe(p, 0, 1000, batch_size)
    for _ in islice(run.losses, SKIPPED):
        pass
    clock = Clock()
    for done, _ in enumerate(islice(run.losses, TIMED), 1):
        if done >= TIMED // 4 and clock.read()[unit] > limit / 10:
            break
    per_step = clock.read()[unit] / done
    run.losses.close()
    return max(int(limit / per_step), 1)


def trained(method: str, p: Any, job: Row) -> Row:
    """Train by a recipe for the budget, and judge the encoder `curve` times, at the end last."""
    import recipes

    recipe = recipes.RECIPES[method]
    steps = steps_within(recipe, p, job["budget"], job["batch_size"])
    run = recipe(p, job["seed"], steps, job["batch_size"])
    if method != "ours":
        p = replace(p, views=replace(p.views, mean=recipes.MEAN, std=recipes.STD))
    looks = {round(steps * i / job["curve"]) for i in range(1, job["curve"] + 1)} | {steps}
    losses, curve, judged = [], [], {}
    clock = Clock()
    for step, loss in enumerate(islice(run.losses, steps), 1):
        losses.append(float(loss))
        if step in looks:
            point = {"step": step, "images_seen": step * run.batch_size} | clock.read()
            with clock.paused():
                judged = judge(embedded(run.backbone, p), p)
            curve.append(point | {kind: judged[kind] for kind in KINDS})
            print(f"  {method}, seed {job['seed']}: {shown(curve[-1])}, loss {losses[-1]:.4g}", file=sys.stderr)
    tenth = max(steps // 10, 1)
    loss = [sum(part) / tenth for part in (losses[:tenth], losses[-tenth:])]
    return curve[-1] | judged | {"steps": steps, "batch_size": run.batch_size, "loss": loss, "curve": curve}


def shown(point: Row) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in point.items())


def embedded(backbone: Any, p: Any) -> Row:
    """Return the features of train, val and test by a frozen copy of a backbone; None: a random one."""
    from barlow.evaluation import features
    from barlow.training import model

    encoder = model.FrozenEncoder(p.model, p.views)
    if backbone is not None:
        encoder.backbone.load_state_dict(backbone.state_dict())
    return {split: features.represent(encoder, features.labelled(split), "cpu") for split in SPLITS}


def judge(splits: Row, p: Any) -> Row:
    """Return the test accuracies by linear probe and kNN, in percent, and which test images were right.

    `knn_whitened` is kNN after the whitening that our encoder ships with, here fitted on train for every method alike.
    """
    from barlow.core import webdataset
    from barlow.evaluation import probe
    from barlow.training.model import Whitening

    train, val, test = ((splits[name].features.float(), splits[name].labels) for name in SPLITS)
    e = p.evaluate
    found = probe.predict(train, val, test[0], len(webdataset.classes()), e.probe_l2, e.knn_k, e.knn_temperature)
    whitening = Whitening(train[0].shape[1])
    whitening.fit(train[0])
    bank, queries = whitening(train[0]), whitening(test[0])
    whitened = probe.knn(queries, bank, train[1], len(webdataset.classes()), e.knn_k, e.knn_temperature).argmax(1)
    predicted = dict(zip(KINDS, (found.linear, found.knn, whitened), strict=True))
    right = {kind: (classes == test[1]).numpy() for kind, classes in predicted.items()}
    scores: Row = {kind: 100 * float(right[kind].mean()) for kind in KINDS}
    return scores | {
        "test_images": len(test[1]),
        "right": {k: np.packbits(v).tobytes().hex() for k, v in right.items()},
    }


def work(job: Row) -> Row:
    """Do one run in the folder of its data, in this process."""
    import torch

    from barlow.core import provenance
    from barlow.settings import loading

    p, method, load = loading.load(), job["method"], os.getloadavg()
    if method == "pixels":
        from barlow import extract

        done = judge({split: extract.pixels(split, min(p.views.size, extract.PIXELS)) for split in SPLITS}, p)
    elif method == "random encoder":
        torch.manual_seed(job["seed"])
        done = judge(embedded(None, p), p)
    else:
        done = trained(method, p, job)
    where = {"hardware": provenance.hardware(), "load": [load, os.getloadavg()], "threads": torch.get_num_threads()}
    return done | where | {"torch": torch.__version__}


def jobs(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Yield the runs on the data in the working folder; `key` tells runs apart."""
    from barlow.core import webdataset
    from barlow.settings import loading

    p = loading.load()
    data = [webdataset.digest(webdataset.tars(split)) for split in ("pretrain", *SPLITS)]
    images = webdataset.count(webdataset.tars("pretrain"))
    network = [p.model.arch, p.model.stem, p.views.size]
    shared = [data, network, asdict(p.evaluate)]
    settings = {"ours": [asdict(p.model), asdict(p.views), asdict(p.pretrain)], "random encoder": asdict(p.views)}
    setting = f"{name}: {images} images, {p.model.arch}, stem {p.model.stem}, {p.views.size} px"
    budget = {name: value for name in ("steps", "seconds", "cpu_seconds") if (value := getattr(args, name))}
    for seed in args.seeds:
        for method in args.methods:
            if method == "pixels" and seed != args.seeds[0]:
                continue
            trains = method not in BASELINES
            job: Row = {"setting": setting, "method": method, "seed": seed, "budget": budget if trains else None}
            job["label"] = args.label if method == "ours" else method
            job["curve"] = args.curve if trains else None
            job["batch_size"] = args.peer_batch if method in ("lightly", "solo-learn") else None
            whole = [*shared, settings.get(method), job]
            yield job | {"key": hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(args: argparse.Namespace) -> None:
    """Do the runs that have no row yet."""
    document = yaml.safe_load(args.params.read_text())
    for change in args.set:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        if name not in document.get(section, {}):
            sys.exit(f"--set {change}: {key} is not a key of {args.params}")
        document[section][name] = yaml.safe_load(value)
    if "lightly" in args.methods and not find_spec("lightly"):
        print("lightly is not installed, so its rows are left out; run `make peers`", file=sys.stderr)
        args.methods.remove("lightly")
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ  # as `barlow` sets it; it helps the peers as well
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    for source in args.data:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            prepare(source, json.loads(json.dumps(document)), {"train": args.images, "test": args.test_images})
            for job in jobs(Path(source).name, args):
                if job["key"] in {row["key"] for row in read(args.out)}:
                    continue
                command = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                row = job | json.loads(done.stdout.splitlines()[-1])
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{row['setting']}, {row['label']}, seed {row['seed']}: {shown(summary(row))}", flush=True)
            os.chdir(ROOT)


def summary(row: Row) -> Row:
    return {name: row[name] for name in (*KINDS, "steps", "images_seen", "seconds", "cpu_seconds") if name in row}


def right(rows: list[Row], kind: str) -> np.ndarray:
    """Return which test images each seed's encoder gets right: bool (seeds, images)."""
    n = rows[0]["test_images"]
    return np.stack([np.unpackbits(np.frombuffer(bytes.fromhex(row["right"][kind]), np.uint8))[:n] for row in rows])


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """Return a - b in points with its interval: Student's t over seeds and, in quadrature, the error of test images."""
    from scipy import stats

    each = a.astype(float) - b
    k, n = each.shape
    images = 1.959964 * each.mean(0).std(ddof=1) / math.sqrt(n)
    seeds = stats.t.ppf(0.975, k - 1) * each.mean(1).std(ddof=1) / math.sqrt(k) if k > 1 else 0.0
    mean, half = 100 * each.mean(), 100 * math.hypot(images, seeds)
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def table(rows: list[Row]) -> Iterator[str]:
    """Yield a Markdown table of one setting and budget; the rows of `ours` come first."""
    from barlow.evaluation import intervals

    order = sorted(rows, key=lambda row: (METHODS.index(row["method"]), row["label"]))
    groups = {label: list(group) for label, group in groupby(order, lambda row: row["label"])}
    first = next(iter(groups))
    kinds = "probe | kNN | kNN whitened"
    yield f"| | {kinds} | {first} minus it: {kinds} | steps | images seen | seconds | processor s | n |"
    yield "|---|" + "---|" * 11
    for label, group in groups.items():
        n = group[0]["test_images"]
        cells = [str(intervals.mean_accuracy([row[kind] for row in group], n)) for kind in KINDS]
        both = [(a, b) for a in groups[first] for b in group if a["seed"] == b["seed"] or b["method"] == "pixels"]
        for kind in KINDS:
            pair = [right(list(side), kind) for side in zip(*both, strict=True)] if both and label != first else None
            cells.append(difference(*pair) if pair else "")
        for name in ("steps", "images_seen", "seconds", "cpu_seconds"):
            cells.append(f"{np.mean([row[name] for row in group]):.0f}" if name in group[0] else "")
        yield f"| {label} | " + " | ".join(cells) + f" | {len(group)} |"


def time_to_quality(rows: list[Row]) -> Iterator[str]:
    """Yield, per label of ours and peer, when our mean kNN first reaches the peer's at the end; ours is whitened."""
    trained = [row for row in rows if row["budget"]]
    keyed = sorted(trained, key=lambda row: (METHODS.index(row["method"]), row["label"], json.dumps(row["budget"])))
    groups = [list(group) for _, group in groupby(keyed, lambda row: (row["label"], row["budget"]))]
    for peer in (group for group in groups if group[0]["method"] != "ours"):
        target, taken = (np.mean([row[name] for row in peer]) for name in ("knn", "cpu_seconds"))
        for own in (group for group in groups if group[0]["method"] == "ours"):
            points = zip(*(row["curve"] for row in own), strict=False)  # the same share of the run for every seed
            means = (
                {name: np.mean([each[name] for each in point]) for name in ("knn_whitened", "cpu_seconds")}
                for point in points
            )
            reached = next((mean["cpu_seconds"] for mean in means if mean["knn_whitened"] >= target), None)
            when = f"after {reached:.0f} s, {reached / taken:.2f} of that" if reached else "not"
            yield (
                f"- {own[0]['label']} ({budget_of(own[0])}) reaches the kNN accuracy that {peer[0]['label']} has after "
                f"{taken:.0f} s of processor time ({target:.1f} %) {when}."
            )


def budget_of(row: Row) -> str:
    names = {"steps": "{:g} steps", "seconds": "{:g} s", "cpu_seconds": "{:g} s of processor time"}
    return "; ".join(names[name].format(value) for name, value in row["budget"].items())


def report(rows: list[Row]) -> None:
    """Print a table per setting and budget, and the time to the peers' quality."""
    for setting, group in groupby(sorted(rows, key=lambda row: row["setting"]), lambda row: row["setting"]):
        of_setting = list(group)
        baselines = [row for row in of_setting if not row["budget"]]
        for budget in sorted({budget_of(row) for row in of_setting if row["budget"]}):
            of_budget = [row for row in of_setting if row["budget"] and budget_of(row) == budget]
            print(f"\n{setting}; {budget}; {', '.join(sorted({row['hardware'] for row in of_budget}))}\n")
            print("\n".join(table([*of_budget, *baselines])))
        print("\n" + "\n".join(time_to_quality(of_setting)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", nargs="+", default=[], metavar="FOLDER", help="folders, `digits`, `synthetic`")
    parser.add_argument(
        "--params", type=Path, default=ROOT / "params.yaml", help="our recipe, the network and the probe"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="changes to --params")
    parser.add_argument("--label", default="ours", help="the name of our recipe's rows, where several are compared")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="of training, by the clock (default 6)")
    budget.add_argument("--cpu-seconds", type=float, help="of training, of processor time")
    budget.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--images", type=int, help="training images, at most; with the same share of each class")
    parser.add_argument("--test-images", type=int, help="test images, at most")
    parser.add_argument("--curve", type=int, default=1, help="evaluations per run, evenly spaced (default: at the end)")
    parser.add_argument("--peer-batch", type=int, help="the peers' batch; their rates follow (default: 128 and 256)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "reports/peers.jsonl", help="rows (default reports/peers.jsonl)"
    )
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.minutes is None and args.cpu_seconds is None and args.steps is None:
        args.minutes = 6.0
    args.seconds = args.minutes and 60 * args.minutes
    args.data = [name if name in ("digits", "synthetic") else str(Path(name).resolve()) for name in args.data]
    args.out, args.params = args.out.resolve(), args.params.resolve()
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.job:
        print(json.dumps(work(args.job)))
        return
    measure(args)
    report(read(args.out))


if __name__ == "__main__":
    if PEERS.exists():
        sys.path.append(str(PEERS))
    main()
