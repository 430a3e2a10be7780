"""`python benchmarks/step.py [FOLDER]`: whole training steps, views included, against a loop in the official manner.

ResNet-18 with the small stem, projector 2048-2048-2048, batch 128, 32 px, on the JPEG files of the folder (without
one, on drawn ones). Both read files, distort, train and update; the loop is that of `official.py`. Each has a process
of its own, ours with the environment that the command `barlow` sets; while one is measured the other does nothing.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path

STEPS, ROUNDS, BATCH = 4, 5, 128


def settings():
    """Return params.yaml with the preset cifar10 and a batch of 128."""
    from barlow.settings import editing, params, strict

    root = Path(__file__).parent.parent
    document = strict.read_yaml(root / "params.yaml")
    list(editing.merge(document, strict.read_yaml(root / "presets/cifar10.yaml")))
    built = strict.build(params.Params, document, "cifar10")
    return replace(built, pretrain=replace(built.pretrain, batch_size=BATCH, device="cpu"))


def ours() -> Iterator[Iterator[None]]:
    """Yield the steps of `barlow pretrain`, as often as asked."""
    import torch

    from barlow.training import model
    from barlow.training.loss import barlow_twins_loss
    from barlow.training.state import Training

    run = Training(settings(), torch.device("cpu"))
    bf16 = model.computes_bf16("auto", run.device)

    def steps() -> Iterator[None]:
        for view_a, view_b in chain.from_iterable(repeat(run.views)):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                z_a, z_b = run.twins(view_a, view_b)
            loss = barlow_twins_loss(z_a, z_b, run.p.lambd)
            run.update(loss)
            run.record(loss, z_a, z_b)
            yield

    endless = steps()
    while True:
        yield (step for step in endless)


def official() -> Iterator[Iterator[None]]:
    """Yield the steps of the official loop; its workers live as long as one of these does."""
    import official
    import torch

    from barlow.training import model

    p, paths = settings(), sorted(Path("images").rglob("*.jpg"))
    torch.manual_seed(0)
    network = model.BarlowTwins(p.model, p.views.size)
    loss_of = official.Loss(network.dim, p.pretrain.lambd)
    optimizer = official.LARS(network.parameters(), 0.1, p.pretrain.weight_decay)

    def steps() -> Iterator[None]:
        for view_a, view_b in official.loader(paths, p.views, BATCH):
            optimizer.zero_grad()
            loss_of(*network(view_a, view_b)).backward()
            optimizer.step()
            yield

    while True:
        yield steps()


def serve(runs: Iterator[Iterator[None]]) -> None:
    """For each line on stdin print samples a second over some steps, after one that is not counted."""
    for _ in sys.stdin:
        with closing(next(runs)) as steps:
            next(steps)
            started = time.perf_counter()
            for _ in islice(steps, STEPS):
                pass
            print(STEPS * BATCH / (time.perf_counter() - started), flush=True)


def main(folder: str | None) -> None:
    """Measure the two in turn."""
    import pictures
    import rounds

    from barlow.core import files, provenance

    print(provenance.hardware())
    source = folder and Path(folder).resolve()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        if source:
            Path("images").symlink_to(source)
        else:
            Path("images").mkdir()
            pictures.files(Path("images"), 4000, 32, 32)
        pictures.shard(sorted(Path("images").resolve().rglob("*.jpg"))[:10_000], files.SHARDS / "pretrain-000000.tar")
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, f"--{name}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
            )
            for name, environment in {"ours": {"OMP_WAIT_POLICY": "PASSIVE"}, "official": {}}.items()
        ]
        rates = []
        for _ in range(ROUNDS):
            rates.append([])
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
                rates[-1].append(float(process.stdout.readline()))
            print(f"  {rates[-1][0]:.1f} against {rates[-1][1]:.1f} samples/s", file=sys.stderr, flush=True)
        for process in processes:
            process.kill()
            process.communicate()
    a, b = (statistics.median(column) for column in zip(*rates, strict=True))
    print(f"whole step: {rounds.faster(a / b for a, b in rates)}; {a:.1f} samples/s against {b:.1f}")


if __name__ == "__main__":
    argument = sys.argv[1] if len(sys.argv) > 1 else None
    if argument == "--ours":
        serve(ours())
    elif argument == "--official":
        serve(official())
    else:
        main(argument)
