"""`benchmarks/peers.py`: the peers' rules against oracles, and a tiny run of the whole."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from barlow.training.optim import LARS

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/peers.py"


@pytest.fixture
def module(monkeypatch):
    """Import a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(SCRIPT.parent)

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_solo_learns_loss_is_the_papers_times_a_tenth(module):
    z_a, z_b = (torch.randn(16, 8, dtype=torch.float64, generator=torch.manual_seed(seed)) for seed in (0, 1))
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z_a, z_b))
    loss = 0.0
    for i in range(8):
        for j in range(8):
            c = float((a[:, i] * b[:, j]).mean())
            loss += (1 - c) ** 2 if i == j else 0.0051 * c**2
    assert float(module("recipes").solo_learn_loss(z_a, z_b)) == pytest.approx(0.1 * loss)


def test_solo_learns_lars_is_the_clipped_rule(module):
    """Without weight decay it is LARS(clip=True); with it, a first step is as its formula says."""

    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 4)).double()

    optimizer = module("recipes").SoloLearnLARS
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)
    ours, theirs = network(), network()
    lars = LARS(ours.parameters(), 0.1, weight_decay=0.0, trust_coefficient=0.02, clip=True)
    solo = optimizer(theirs.parameters(), 0.1)
    for scale in (1e-3, 1.0, 0.1, 10.0):  # clipped or not
        for each, step in ((ours, lars.step), (theirs, lambda: solo.step(weight_decay=0.0))):
            each.zero_grad()
            (scale * (each(x) - y).square().mean()).backward()
            step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)

    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    solo = optimizer([w], 0.1)
    w.grad = torch.tensor([[0.0, 2.0]])
    solo.step(weight_decay=0.5)
    rate = 0.02 * 5 / (2 + 0.5 * 5)  # below 0.1, so not clipped
    torch.testing.assert_close(w.detach(), torch.tensor([[3 - rate * 1.5, 4 - rate * 4.0]]))


def test_solo_learns_rate_warms_up_and_falls_to_zero(module):
    rates = [module("recipes").solo_learn_rate(step, 100, 11, 0.3) for step in range(101)]
    assert rates[0] == 3e-5
    assert rates[5] == pytest.approx((3e-5 + 0.3) / 2)
    assert rates[10] == rates[11] == 0.3
    assert rates[100] == pytest.approx(0)
    assert sorted(rates[11:], reverse=True) == rates[11:]


def test_the_difference_holds_seeds_and_images(module):
    """Two seeds, four images: +25 and -25 points; the mean over seeds is 1/2, 0, -1/2, 0."""
    a = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool)
    b = np.array([[0, 1, 0, 0], [1, 1, 1, 0]], bool)
    seeds = 12.7062 * np.std([0.25, -0.25], ddof=1) / math.sqrt(2)
    images = 1.959964 * np.std([0.5, 0, -0.5, 0], ddof=1) / math.sqrt(4)
    half = 100 * math.hypot(seeds, images)
    assert module("peers").difference(a, b) == f"+0.0 ({-half:+.1f} to {half:+.1f})"


def test_the_clock_leaves_pauses_out_and_counts_workers(module):
    clock = module("peers").Clock()
    with clock.paused():
        burn(0.3)
    without = clock.read()
    burn(0.2)
    here = clock.read()
    subprocess.run([sys.executable, "-c", "sum(range(10_000_000))"], check=True)
    assert without["cpu_seconds"] < 0.1
    assert 0.15 < here["cpu_seconds"] < 0.5
    assert clock.read()["cpu_seconds"] > here["cpu_seconds"] + 0.05


def burn(seconds):
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass


def test_what_has_a_row_is_not_run_again(module, tmp_path, monkeypatch):
    peers, ran, printed = module("peers"), [], []
    out = tmp_path / "rows.jsonl"
    out.write_text(json.dumps({"key": "a"}) + "\n")

    def run(command, **_):
        ran.append(json.loads(command[-1])["key"])
        return subprocess.CompletedProcess(command, 0, 'noise\n{"knn": 50.0, "linear": 60.0}\n')

    monkeypatch.setattr(peers, "prepare", lambda *given: printed.append(given))
    monkeypatch.setattr(
        peers, "jobs", lambda *_: ({"setting": "s", "label": "l", "seed": 0, "key": key} for key in "ab")
    )
    monkeypatch.setattr(peers.subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        peers.measure(peers.parse(["--data", "digits", "--out", str(out), "--set", "pretrain.lr_weights=0.06"]))
    assert ran == ["b"]
    assert peers.read(out)[1]["knn"] == 50.0
    assert printed[0][1]["pretrain"]["lr_weights"] == 0.06


def test_time_to_quality_is_that_of_the_first_mean_that_reaches_the_peer(module):
    def row(label, seconds, *knn):
        curve = [
            {"knn": each - 1, "knn_whitened": each, "cpu_seconds": seconds * i / len(knn)}
            for i, each in enumerate(knn, 1)
        ]
        return {"method": label, "label": label, "budget": {"steps": 9}, "curve": curve} | curve[-1]

    rows = [
        row("ours", 90, 30, 50, 70),
        row("ours", 90, 50, 60, 70),
        row("lightly", 110, 56),
        row("solo-learn", 50, 72),
    ]
    lightly, solo = module("peers").time_to_quality(rows)
    assert lightly.endswith("after 110 s of processor time (55.0 %) after 60 s, 0.55 of that.")
    assert solo.endswith("after 50 s of processor time (71.0 %) not.")


def tiny(folder, params, *options):
    """Run the script for four steps on a tiny set; return what it prints and its rows."""
    (folder / "params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(params)))))
    given = ["--data", "synthetic", "--params", folder / "params.yaml", "--out", folder / "rows.jsonl"]
    given += ["--steps", "4", "--curve", "2", "--peer-batch", "8", "--seeds", "0"]
    command = [sys.executable, "-W", "ignore", SCRIPT, *given, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_tiny_run(tmp_path, smoke):
    out, rows = tiny(tmp_path, smoke, "--methods", "ours", "solo-learn", "pixels")
    assert [row["method"] for row in rows] == ["ours", "solo-learn", "pixels"]
    for row, batch in zip(rows, (64, 8), strict=False):
        assert [point["images_seen"] for point in row["curve"]] == [2 * batch, 4 * batch]
        assert row["cpu_seconds"] > row["curve"][0]["cpu_seconds"] > 0
        assert row["curve"][-1]["knn"] == row["knn"]
        assert all(map(math.isfinite, row["loss"]))
    assert "| solo-learn | " in out
    assert "ours (4 steps) reaches the kNN accuracy that solo-learn has after" in out


@pytest.mark.slow
def test_lightlys_recipe_runs_where_lightly_is_installed(tmp_path, smoke):
    if not (ROOT / ".venv-peers/lightly").exists() and not find_spec("lightly"):
        pytest.skip("lightly is not installed; `make peers` installs it into .venv-peers")
    _, (row,) = tiny(tmp_path, smoke, "--methods", "lightly")
    assert all(map(math.isfinite, row["loss"]))
