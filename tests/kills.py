"""`python tests/kills.py [N]`: kill -9 a training at N (20) random points; the weights must come out bit-identical.

Runs in the current folder, a project with data/shards and params.yaml, and rewrites its models/.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from barlow import pretrain
from barlow.settings import loading  # imported once, for all the processes that are killed

ENCODER = Path("models/encoder.safetensors")


def stage(stdout: int) -> None:
    """Run the stage, which says what it says to `stdout`."""
    os.dup2(stdout, 1)
    pretrain.run(loading.load())


def start() -> tuple[BaseProcess, str]:
    """Start the stage in a process of its own; return it once it trains, and what it said about where."""
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=stage, args=(writer,))
    process.start()
    os.close(writer)
    process.said = os.fdopen(reader)  # open as long as the process is
    lines = [process.said.readline() for _ in range(2)]
    return process, lines[1].strip()


def weights() -> str:
    """Return the hash of the encoder's tensors and metadata."""
    return hashlib.sha256(ENCODER.read_bytes()).hexdigest()


def main(kills: int) -> int:
    shutil.rmtree("models", ignore_errors=True)
    process, _ = start()
    started = time.monotonic()
    process.join()
    if process.exitcode:
        return process.exitcode
    seconds, expected = time.monotonic() - started, weights()
    print(f"undisturbed: {seconds:.1f} s of training, {expected[:12]}", flush=True)
    draws, runs, killed = random.Random(0), 0, 0
    while killed < kills:
        runs += 1
        shutil.rmtree("models")
        while True:
            process, place = start()
            delay = draws.uniform(0, seconds / 2)
            process.join(delay if killed < kills else None)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            killed += 1
            print(f"kill {killed}: {delay:.2f} s after: {place}", flush=True)
        if process.exitcode or weights() != expected:
            print(f"FAILED: run {runs} ended with {process.exitcode} and other weights", file=sys.stderr)
            return 1
    print(f"{killed} kills in {runs} run(s): the same weights, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
