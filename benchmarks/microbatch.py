"""`python benchmarks/microbatch.py`: memory and time of a step in microbatches against a step on the whole batch.

ResNet-18 with the stem `stride`, 32 px, batch 512, projector 2048-2048-2048, float32, one thread, AdamW. Each step has
a fresh process, in turn: the whole batch, then microbatches. A process warms up on a small batch first. Memory is the
peak of the resident set less what was resident before the step: weights, optimizer, views and libraries. Time is the
processor's, which other work on the machine changes less than the clock's.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH, SIZES, ROUNDS = 512, (64, 16), 3


def step(size: int) -> tuple[float, float]:
    """Return MiB and seconds of one step, `size` images at a time."""
    import torch

    from barlow.settings import params, strict
    from barlow.training import model, optim
    from barlow.training.loss import barlow_twins_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = model.BarlowTwins(params.Model("resnet18", "stride", (2048, 2048, 2048), False, False, None), 32)
    network = network.to(memory_format=torch.channels_last)
    settings = {**strict.read_yaml("params.yaml")["pretrain"], "optimizer": "adamw"}
    groups = [[w for w in network.parameters() if (w.ndim > 1) is wide] for wide in (True, False)]
    optimizer = optim.build(strict.build(params.Pretrain, settings, "params.yaml"), *groups)
    embed = model.Microbatches(network, size) if size < BATCH else network
    batch = [torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2)]

    def update(n: int) -> None:
        barlow_twins_loss(*embed(*(view[:n] for view in batch)), 0.0051).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    update(8)
    before, started = resident(), time.process_time()
    update(BATCH)
    seconds = time.process_time() - started
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before, seconds


def resident() -> float:
    """Return the MiB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def spread(values: list[float]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure whole batch and microbatches in turn."""
    from barlow.core import provenance

    print(provenance.hardware())
    figures: dict[int, list[tuple[float, float]]] = {size: [] for size in (BATCH, *SIZES)}
    for _ in range(ROUNDS):
        for size, each in figures.items():
            done = subprocess.run([sys.executable, __file__, str(size)], stdout=subprocess.PIPE, check=True)
            each.append(json.loads(done.stdout))
            print(f"  {size} at a time: {each[-1][0]:.0f} MiB, {each[-1][1]:.1f} s", file=sys.stderr, flush=True)
    for size in SIZES:
        pairs = list(zip(figures[size], figures[BATCH], strict=True))
        memory, seconds = ([part[i] / whole[i] for part, whole in pairs] for i in (0, 1))
        mib = " against ".join(f"{statistics.median(m for m, _ in figures[each]):.0f}" for each in (size, BATCH))
        print(
            f"{size} of {BATCH}: {spread(memory)} of the memory, {spread(seconds)} of the time, n={ROUNDS}; {mib} MiB"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(step(int(sys.argv[1]))))
    else:
        main()
