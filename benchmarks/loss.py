"""`python benchmarks/loss.py`: the loss, forward and backward: time, memory, and where its two forms are the faster.

Against the paper's pseudo-code at the same size, written down as a user would.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import rounds
import torch

from barlow.core import provenance
from barlow.training import loss
from barlow.training.loss import barlow_twins_loss


def paper_loss(z_a, z_b, lambd):
    """Algorithm 1 of the paper, in PyTorch."""
    n, dim = z_a.shape
    z_a_norm = (z_a - z_a.mean(0)) / z_a.std(0)
    z_b_norm = (z_b - z_b.mean(0)) / z_b.std(0)
    c = z_a_norm.T @ z_b_norm / n
    c_diff = (c - torch.eye(dim)).pow(2)
    off_diagonal = ~torch.eye(dim, dtype=torch.bool)
    return torch.where(off_diagonal, lambd * c_diff, c_diff).sum()


def our_loss(z_a, z_b, lambd):
    return barlow_twins_loss(z_a, z_b, lambd).total


def step(function, *views):
    views = [view.clone().requires_grad_() for view in views]
    function(*views, 0.0051).backward()


def compare(n, dim):
    views = torch.randn(2, n, dim)
    rounds.compare(f"loss N={n} D={dim}", lambda: step(our_loss, *views), lambda: step(paper_loss, *views))


def compare_forms(n, dim):
    """Time the form that is not chosen against the one that is."""
    views, chosen = torch.randn(2, n, dim), loss.form(n, dim)
    other = {"dual": "direct", "direct": "dual"}[chosen]

    def run(form):
        with mock.patch.object(loss, "form", return_value=form):
            step(our_loss, *views)

    rounds.compare(f"form N={n} D={dim}: {chosen}", lambda: run(chosen), lambda: run(other))


def peak(name, n, dim):
    """Return the mebibytes that a step needs on top of its input, measured in a process of its own."""
    command = [sys.executable, __file__, name, str(n), str(dim)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name, n, dim):
    function = {"ours": our_loss, "paper": paper_loss}[name]
    step(function, *torch.randn(2, 64, 128))
    views = torch.randn(2, n, dim)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
    step(function, *views)
    print(memory("VmHWM") - before)


def memory(name):
    """Return a line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        sys.exit()
    print(provenance.hardware())
    torch.manual_seed(0)
    for n, dim in [(64, 512), (256, 2048), (256, 8192), (1024, 2048)]:
        compare(n, dim)
    ours, paper = (peak(name, 256, 8192) for name in ("ours", "paper"))
    print(f"peak memory N=256 D=8192: {paper / ours:.1f} times less; {ours:.0f} MiB against {paper:.0f} MiB")
    print(f"N=256 D=65536: {rounds.seconds(lambda: step(our_loss, *torch.randn(2, 256, 65536))):.2f} s")
    for ratio in (0.25, 0.5, 0.75, 1, 1.5, 2, 4):
        compare_forms(int(1024 * ratio), 1024)
    for n, dim in [(256, 2**power) for power in range(9, 15)] + [(2**power, 2048) for power in range(5, 11)]:
        views = torch.randn(2, n, dim)
        step(our_loss, *views)
        times = sorted(rounds.seconds(lambda views=views: step(our_loss, *views)) for _ in range(rounds.ROUNDS))
        print(f"growth N={n} D={dim}: {1000 * times[len(times) // 2]:.1f} ms", flush=True)
