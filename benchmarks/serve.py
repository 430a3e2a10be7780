"""`python benchmarks/serve.py`: `barlow serve` under load, against its ceiling and against LitServe.

For each network, in interleaved rounds: the ceiling (one thread per processor decodes JPEGs and runs batches of 32, no
HTTP); `barlow serve` with 64 connections that post one JPEG per request; the same without batching; the same with int8;
LitServe with the same file. Then the latency at 25, 50 and 80 % of that load. The client is another process on the same
processors.

`--reloads N` replaces the model N times under load, and twice by a broken one. `--soak SECONDS` keeps the load up.
`--against SRC` compares this checkout with another one's src folder; a small --model shows the service's own work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from barlow.core import files, provenance
from barlow.core.images import decode
from barlow.data import synthetic
from barlow.encoder import quantize
from barlow.encoder.encoder import Encoder
from barlow.evaluation import onnx_file
from barlow.settings import loading
from barlow.training import model

HERE = Path(__file__).parent
ROUNDS = 3
SECONDS = 5
LITSERVE = Path(".cache/litserve")


def photographs(folder, side, count=128):
    """Write JPEGs that all have the same size."""
    folder.mkdir(parents=True)
    families = list(synthetic.FAMILIES)
    for i in range(count):
        pixels = synthetic.surface(families[i % len(families)], min(side, 64), np.random.default_rng(i))
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:03}.jpg", quality=88)
    return folder


def networks(defaults, folder):
    """Yield name, ONNX file, int8 file and a folder of JPEGs; random weights are as fast as trained ones."""
    yield "models/encoder.onnx", files.ONNX, files.REDUCED / "int8.onnx", photographs(folder / "48", 48)
    for stem, size, side in (("small", 32, 64), ("imagenet", 224, 480)):
        shape = dataclasses.replace(defaults.model, arch="resnet18", stem=stem)
        network = onnx_file.Exported(
            model.FrozenEncoder(shape, dataclasses.replace(defaults.views, size=size)), {}
        ).eval()
        path, small = folder / f"{stem}.onnx", folder / f"{stem}-int8.onnx"
        onnx_file.write(network, {"space": stem, "classes": "[]", "image_size": str(size)}, defaults.export.opset, path)
        quantize.int8(path, small, 64)
        yield f"resnet18, {size} px from {side} px", path, small, photographs(folder / str(side), side)


def ceiling(onnx, folder):
    """Return the images per second of decoding and onnxruntime alone."""
    encoder = Encoder(onnx, threads=1)
    contents = [path.read_bytes() for path in sorted(folder.iterdir())]
    done = [0] * files.cpus()
    end = time.perf_counter() + SECONDS

    def work(thread):
        rng = random.Random(thread)
        while time.perf_counter() < end:
            for embeddings, _ in encoder.run((decode(rng.choice(contents)) for _ in range(32)), 32):
                done[thread] += len(embeddings)

    started = time.perf_counter()
    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(len(done))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)


@contextmanager
def running(command, path, env=None):
    """Run a server, wait until its `path` answers, and yield its port and process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(part).replace("PORT", str(port)) for part in command]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True, "env": env}
    with subprocess.Popen(command, **silent) as server:
        try:
            while not answers(port, path):
                if server.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} ended with {server.returncode}")
                time.sleep(0.05)
            yield port, server
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(10)
            with suppress(ProcessLookupError):  # LitServe leaves its workers behind
                os.killpg(server.pid, signal.SIGKILL)


def answers(port, path):
    """Return whether a GET is answered."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1):
            return True
    except OSError:
        return False


def barlow(onnx, *flags, src=HERE.parent / "src"):
    """Run `barlow serve` of a checkout."""
    command = [sys.executable, "-m", "barlow.cli", "serve", "--model", onnx, "--port", "PORT", *flags]
    return running(command, "/v2/health/ready", os.environ | {"PYTHONPATH": str(src)})


def litserve(onnx):
    """Run LitServe with the same file in its own environment, tuned alike: one process per processor."""
    if not (LITSERVE / "bin/litserve").exists():
        subprocess.run([sys.executable, "-m", "venv", LITSERVE], check=True)
        pip = [LITSERVE / "bin/pip", "install", "--quiet", "litserve", "onnxruntime", "pillow", "python-multipart"]
        subprocess.run(pip, check=True)
    return running([LITSERVE.absolute() / "bin/python", HERE / "litserve_app.py", onnx, "PORT"], "/health")


def load(port, folder, route="/v1/embed", seconds=SECONDS, rate=None, images=1):
    """Return the measurements of the client process."""
    command = [
        sys.executable,
        HERE / "load.py",
        f"127.0.0.1:{port}",
        folder,
        "--route",
        route,
        "--seconds",
        str(seconds),
        "--images",
        str(images),
    ]
    command += ["--rate", str(rate)] if rate else []
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert set(measured["statuses"]) == {"200"}, measured
    return measured


def compare(name, onnx, small, folder):
    """Print throughput against the ceiling, and latencies."""
    columns = {"ceiling": [], "barlow": [], "no batching": [], "int8": [], "litserve": []}
    for _ in range(ROUNDS):
        columns["ceiling"].append(ceiling(onnx, folder))
        with barlow(onnx) as (port, _):
            load(port, folder, seconds=1)
            columns["barlow"].append(load(port, folder)["rate"])
        with barlow(onnx, "--max-batch-size", "1") as (port, _):
            load(port, folder, seconds=1)
            columns["no batching"].append(load(port, folder)["rate"])
        with barlow(small) as (port, _):
            load(port, folder, seconds=1)
            columns["int8"].append(load(port, folder)["rate"])
        with litserve(onnx) as (port, _):
            load(port, folder, "/predict", seconds=1)
            columns["litserve"].append(load(port, folder, "/predict")["rate"])
    print(f"\n{name}: images/s, median of {ROUNDS} rounds (share of the same round's ceiling, smallest to largest)")
    for key, rates in columns.items():
        shares = [100 * rate / most for rate, most in zip(rates, columns["ceiling"], strict=True)]
        spread = f"{statistics.median(shares):.0f} % ({min(shares):.0f} to {max(shares):.0f})"
        print(f"  {key:<12}{statistics.median(rates):8.0f}   {spread}", flush=True)
    peak = statistics.median(columns["barlow"])
    with barlow(onnx) as (port, _):
        load(port, folder, seconds=1)
        for percent in (25, 50, 80):
            measured = load(port, folder, rate=peak * percent / 100, seconds=2 * SECONDS)
            text = ", ".join(f"{key} {measured[key]:.1f} ms" for key in ("p50", "p95", "p99"))
            print(f"  at {percent} % of {peak:.0f} requests/s: {text}", flush=True)


def pair(src, onnx, images, rounds):
    """Print this checkout's requests per second and processor time per request as ratios to another checkout's."""
    with tempfile.TemporaryDirectory() as name, barlow(onnx) as ours, barlow(onnx, src=src) as theirs:
        pictures = photographs(Path(name) / "48", 48)
        ratios = {"requests per second": [], "processor time per request": []}
        for i in range(-1, rounds):  # the first round warms up
            results = {}
            for port, server in (ours, theirs) if i % 2 else (theirs, ours):
                process = psutil.Process(server.pid)
                before = sum(process.cpu_times()[:2])
                measured = load(port, pictures, seconds=1.5, images=images)
                spent = sum(process.cpu_times()[:2]) - before
                results[port] = measured["rate"], spent / sum(measured["statuses"].values())
            for values, our, their in zip(ratios.values(), results[ours[0]], results[theirs[0]], strict=True):
                values += [our / their] * (i >= 0)
    for key, values in ratios.items():
        low, median, high = statistics.quantiles(values)
        print(f"{key}: {median:.3f} of {src}, quartiles {low:.3f} and {high:.3f}, n={rounds} pairs", flush=True)


def endure(reloads, soak):
    """Replace the model under load, and print failures and memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good, target = folder / "good.onnx", folder / "model.onnx"
        shutil.copy(files.ONNX, good)
        shutil.copy(good, target)
        pictures = photographs(folder / "48", 48)
        with barlow(target) as (port, server):
            process, sizes, stop = psutil.Process(server.pid), [], threading.Event()
            load(port, pictures, seconds=5)

            def watch():
                while not stop.wait(1):
                    sizes.append(process.memory_info().rss / 2**20)

            watcher = threading.Thread(target=watch)
            watcher.start()
            seconds = soak or 3.0 * (reloads + 2)
            replacer = threading.Thread(target=replace, args=(port, good, target, reloads))
            replacer.start()
            measured = load(port, pictures, seconds=seconds)
            replacer.join()
            stop.set()
            watcher.join()
            counts = metrics(port, "barlow_reloads_total", "barlow_rejects_total")
        tenth = max(len(sizes) // 10, 1)
        first, last = statistics.median(sizes[tenth : 3 * tenth]), statistics.median(sizes[-2 * tenth :])
        print(
            f"{seconds:.0f} s, {sum(measured['statuses'].values())} requests, statuses {measured['statuses']}, {counts}"
        )
        print(
            f"  memory {first:.1f} MiB after warm-up, {last:.1f} at the end: {100 * (last / first - 1):+.1f} %",
            flush=True,
        )


def replace(port, good, target, reloads):
    """Replace the model again and again, and by a broken one after the 7th and the 14th time."""
    for i in range(reloads):
        for content in [good.read_bytes()] + [good.read_bytes()[:-1000]] * (i in (6, 13)):
            before = metrics(port, "barlow_reloads_total")
            temporary = target.with_name("new")
            temporary.write_bytes(content)
            temporary.replace(target)
            while metrics(port, "barlow_reloads_total") == before:
                time.sleep(0.1)


def metrics(port, *names):
    """Return values of the service's /metrics, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reloads", type=int, default=0)
    parser.add_argument("--soak", type=float, default=0)
    parser.add_argument("--against", type=Path, metavar="SRC")
    parser.add_argument("--model", type=Path, default=files.ONNX, help="of --against")
    parser.add_argument("--images", type=int, default=1, help="per request of --against")
    parser.add_argument("--rounds", type=int, default=16, help="of --against")
    arguments = parser.parse_args()
    print(provenance.hardware())
    if arguments.against:
        pair(arguments.against, arguments.model, arguments.images, arguments.rounds)
        return
    if arguments.reloads or arguments.soak:
        endure(arguments.reloads, arguments.soak)
        return
    with tempfile.TemporaryDirectory() as folder:
        for network in networks(loading.load(), Path(folder)):
            compare(*network)


if __name__ == "__main__":
    main()
