"""`python tests/kills.py [N]`: kill -9 a training at N (20) random points; the weights must come out bit-identical.

Runs in the current folder, a project with data/shards and params.yaml, and rewrites its models/.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ENCODER, RESUME = Path("models/encoder.safetensors"), Path("models/resume")


def start() -> tuple[subprocess.Popen[str], str]:
    """Start the stage; return it once it trains, and what it said about where."""
    process = subprocess.Popen([sys.executable, "-m", "barlow.cli", "pretrain"], stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(2)]
    return process, lines[1].strip()


def weights() -> str:
    """Return the hash of the encoder's tensors and metadata."""
    return hashlib.sha256(ENCODER.read_bytes()).hexdigest()


def main(kills: int) -> int:
    shutil.rmtree("models", ignore_errors=True)
    process, _ = start()
    started = time.monotonic()
    if process.communicate() and process.returncode:
        return process.returncode
    seconds, expected = time.monotonic() - started, weights()
    print(f"undisturbed: {seconds:.1f} s of training, {expected[:12]}", flush=True)
    draws, runs, killed = random.Random(0), 0, 0
    while killed < kills:
        runs += 1
        shutil.rmtree("models")
        while True:
            process, place = start()
            delay = draws.uniform(0, seconds / 2)
            try:
                process.communicate(timeout=delay if killed < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                print(f"kill {killed}: {delay:.2f} s after: {place}", flush=True)
        if process.returncode or weights() != expected:
            print(f"FAILED: run {runs} ended with {process.returncode} and other weights", file=sys.stderr)
            return 1
    print(f"{killed} kills in {runs} run(s): the same weights, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
