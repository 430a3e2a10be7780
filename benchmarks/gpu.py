"""`make gpu` (`python benchmarks/gpu.py`): all that wants a GPU, in one run: is it right, is it fast, is it good?

Each step prints a line per figure, with its bound, and its result goes into OUT/gpu.json. Started again, it goes on
with the steps that have no result there, and with the epochs that are left. `--device cpu --tiny` rehearses the whole
of it in minutes. It needs Python, torch, torchvision, DALI and what `barlow pretrain` imports; not pandas, dvclive or
ruamel.

right   views on the device against the CPU; loss and LARS against float64; a run killed and resumed, to the bit;
        the stages after pretraining; the ONNX file; two processes against one (where there are two GPUs)
fast    pairs per second of whole steps, and where a step's time goes; DALI alone; the loss; the optimizer
good    CIFAR-10 by the preset for as many epochs as the minutes allow, kNN every ten
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import os
import signal
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from barlow import extract, finetune, pretrain
from barlow.core import files, provenance, webdataset
from barlow.core.errors import Interrupted
from barlow.core.images import encode
from barlow.data import synthetic
from barlow.evaluation import features, probe
from barlow.settings import editing, params, strict
from barlow.training import distort, model, views
from barlow.training.loss import barlow_twins_loss
from barlow.training.optim import LARS
from barlow.training.state import Training

ROOT = Path(__file__).resolve().parent.parent
KNN = (200, 0.1)  # k and temperature, as lightly's CIFAR-10 benchmark has them


class Figure(NamedTuple):
    """A measured value; `bound` is what it is held to, (low, high), either may be None."""

    name: str
    value: float
    unit: str = ""
    bound: tuple[float | None, float | None] = (None, None)

    @property
    def holds(self) -> bool:
        low, high = self.bound
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    def __str__(self) -> str:
        low, high = self.bound
        wanted = [f"at {name} {end:g}" for name, end in (("least", low), ("most", high)) if end is not None]
        verdict = f"  ({' and '.join(wanted)}: {'holds' if self.holds else 'MISSED'})" if wanted else ""
        return f"  {self.name:<52}{self.value:>12.4g} {self.unit}{verdict}"


@dataclasses.dataclass
class Bench:
    """What the steps share."""

    device: torch.device
    out: Path
    tiny: bool
    cifar: Path | None
    photos: Path | None
    deadline: float

    @property
    def gpu(self) -> int | None:
        return self.device.index

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], times: int) -> float:
        """Return the wall time of one of some calls, after two that warm up."""
        call(), call()
        self.wait()
        started = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return (time.perf_counter() - started) / times

    def project(self, name: str) -> Path:
        """Change into a folder of its own below `out`."""
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        return folder


STEPS: dict[str, Callable[[Bench], Iterator[Figure]]] = {}


def step(function: Callable[[Bench], Iterator[Figure]]) -> Callable[[Bench], Iterator[Figure]]:
    """Enter a step under its function's name, `right_loss` for instance."""
    STEPS[function.__name__] = function
    return function


def settings(bench: Bench, name: str | None = None, **pretraining: Any) -> params.Params:
    """Return params.yaml with a preset merged in and other values in its section `pretrain`."""
    document = strict.read_yaml(ROOT / "params.yaml")
    for preset_name in filter(None, (name, "smoke" if bench.tiny else None)):
        list(editing.merge(document, strict.read_yaml(ROOT / f"presets/{preset_name}.yaml")))
    document["pretrain"] |= {"device": bench.device.type} | pretraining
    built: params.Params = strict.build(params.Params, document, "params.yaml")
    return built


# --- images


def jpeg(pixels: Any, **options: Any) -> bytes:
    return encode(Image.fromarray(pixels), "JPEG", **options)


def photographs(bench: Bench, n: int, side: int) -> list[bytes]:
    """Return JPEG files with halved chroma: those of --photos, else drawn ones with colour noise."""
    if bench.photos is not None:
        return [path.read_bytes() for path in itertools.islice(sorted(bench.photos.rglob("*.jpg")), n)]
    families, drawn = list(synthetic.FAMILIES), []
    for i in range(n):
        rng = np.random.default_rng(i)
        noise = np.asarray(
            Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)).resize((side,) * 2)
        )
        drawn.append(jpeg(synthetic.surface(families[i % 10], side, rng) // 2 + noise // 2, quality=90, subsampling=2))
    return drawn


def write_shard(split: str, samples: Iterator[tuple[bytes, int]]) -> None:
    """Write one tar of images that PIL finds the sides of."""

    def complete() -> Iterator[webdataset.Sample]:
        for i, (data, label) in enumerate(samples):
            width, height = Image.open(io.BytesIO(data)).size
            yield webdataset.Sample(f"{split}{i:08d}", data, "jpg", label, height, width)

    webdataset.write(files.SHARDS / f"{split}-000000.tar", complete())


def surfaces(bench: Bench, side: int = 32) -> None:
    """Write shards of drawn images, if they are not there: 2,048 to pretrain on and a few labelled ones."""
    families = list(synthetic.FAMILIES)[:4]
    for split, n in {"pretrain": 256 if bench.tiny else 2048, "train": 80, "val": 40, "test": 40}.items():
        if not webdataset.tars(split):
            rngs = (np.random.default_rng([len(split), i]) for i in range(n))
            drawn = (jpeg(synthetic.surface(families[i % 4], side, rng)) for i, rng in enumerate(rngs))
            write_shard(split, ((data, -1 if split == "pretrain" else i % 4) for i, data in enumerate(drawn)))
    files.write_json(files.SHARDS / webdataset.CLASSES_FILE, families)


def cifar(bench: Bench) -> None:
    """Write CIFAR-10's shards: train as `pretrain` and `train`, test as `val`, which kNN is measured on."""
    if bench.cifar is None:
        surfaces(bench)
        return
    if webdataset.tars("val"):
        return
    found: dict[str, list[tuple[bytes, str]]] = {"train": [], "test": []}
    with tarfile.open(bench.cifar) as archive:
        for member in archive:
            split, label, *_ = [*Path(member.name).parts[-3:], "", ""]
            if member.isfile() and member.name.endswith(".jpg"):
                found[split].append((archive.extractfile(member).read(), label))  # type: ignore[union-attr]
    classes = sorted({label for _, label in found["train"]})
    for split, images in {"pretrain": found["train"], "train": found["train"], "val": found["test"]}.items():
        ordered = [images[i] for i in np.random.default_rng(0).permutation(len(images))]
        labels = (-1 if split == "pretrain" else classes.index(label) for _, label in ordered)
        write_shard(split, zip((data for data, _ in ordered), labels, strict=True))
    files.write_json(files.SHARDS / webdataset.CLASSES_FILE, classes)


# --- right


def operations(bench: Bench) -> Iterator[tuple[str, Any, Any]]:
    """Yield each operation's name and its outputs on the CPU and on the device, in levels of 255."""
    from nvidia.dali import fn, pipeline_def

    p, n, side = settings(bench).views, 16, 96
    rng = np.random.default_rng(0)
    batch = [np.asarray(Image.open(io.BytesIO(data)).resize((side, side))) for data in photographs(bench, n, side)]
    drawn = distort.draw(p, 0, np.full((n, 2), side), rng)
    sigma, mirror = drawn.sigma, drawn.mirror
    transforms: dict[str, tuple[Any, list[Any]]] = {
        "resized crop": (lambda x, start, end: distort.resized_crop(x, start, end, p.size), [drawn.start, drawn.end]),
        "colour jitter": (distort.color_jitter, [drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue]),
        "grayscale": (distort.grayscale, []),
        "blur": (distort.blur, [sigma]),
        "solarize": (distort.solarize, []),
        "normalize": (lambda x, mirror: distort.normalize(x, mirror, (0.0,) * 3, (1 / 255,) * 3), [mirror]),
    }
    for name, (transform, arguments) in transforms.items():
        outputs = []
        for device in (None, bench.gpu):

            @pipeline_def(enable_conditionals=True)
            def pipeline(device=device, transform=transform, arguments=arguments):
                layouts = ["HWC", *[""] * len(arguments)]
                source = fn.external_source(lambda: (batch, *arguments), num_outputs=len(layouts), layout=layouts)
                pixels, *nodes = source if arguments else (source[0],)
                return transform(pixels if device is None else pixels.gpu(), *nodes)

            made = pipeline(batch_size=n, num_threads=2, device_id=device, prefetch_queue_depth=1)
            (out,) = made.run()
            outputs.append(np.asarray((out.as_cpu() if hasattr(out, "as_cpu") else out).as_tensor()).astype(np.float32))
        yield name, *outputs


@step
def right_operations(bench: Bench) -> Iterator[Figure]:
    """Each operation of the views on the device against the CPU."""
    for name, on_cpu, on_device in operations(bench):
        difference = np.abs(on_cpu - on_device)
        yield Figure(f"{name}: mean difference", float(difference.mean()), "levels", (None, 0.6))
        yield Figure(f"{name}: largest", float(difference.max()), "levels", (None, 12))


@step
def right_views(bench: Bench) -> Iterator[Figure]:
    """Whole views of photographs on the device against the CPU, the same distortions drawn."""
    bench.project("photographs")
    p, n = settings(bench), 16 if bench.tiny else 64
    if not webdataset.tars("pretrain"):
        write_shard("pretrain", ((data, -1) for data in photographs(bench, n, 320)))
    pairs = []
    for device in (None, bench.gpu):
        twins = views.TwinViews(webdataset.tars("pretrain"), p.views, n, 0, device_id=device)
        pairs.append(torch.cat([view.cpu() for view in next(iter(twins))]))
    std = 255 * torch.tensor(p.views.std).view(1, 3, 1, 1)
    difference = ((pairs[0] - pairs[1]) * std).abs()
    yield Figure("views: mean difference", float(difference.mean()), "levels", (None, 1))
    yield Figure(
        "views: 99.9 % are below",
        float(difference.flatten().float().kthvalue(int(0.999 * difference.numel()))[0]),
        "levels",
        (None, 12),
    )


@step
def right_loss(bench: Bench) -> Iterator[Figure]:
    """Loss and gradient in float32 on the device against float64 on the CPU, in both forms."""
    for n, dim in [(32, 128), (128, 32)] if bench.tiny else [(256, 2048), (512, 8192), (2048, 256)]:
        generator = torch.Generator().manual_seed(0)
        z_a = torch.randn(n, dim, generator=generator)
        z_b = z_a + torch.randn(n, dim, generator=generator)
        found = []
        for device, dtype in (("cpu", torch.float64), (bench.device, torch.float32)):
            a, b = (z.to(device, dtype).requires_grad_() for z in (z_a, z_b))
            loss = barlow_twins_loss(a, b, 0.0051).total
            loss.backward()  # type: ignore[no-untyped-call]
            found.append((loss.detach().cpu().double(), torch.cat([a.grad, b.grad]).cpu().double()))
        (expected, gradient), (loss, found_gradient) = found
        yield Figure(f"loss N={n} D={dim}: relative error", float((loss / expected - 1).abs()), "", (None, 1e-5))
        error = (found_gradient - gradient).norm() / gradient.norm()
        yield Figure(f"its gradient N={n} D={dim}: relative error", float(error), "", (None, 1e-5))


@step
def right_lars(bench: Bench) -> Iterator[Figure]:
    """Three steps of LARS on the device, in float32 and channels_last, against a loop in float64."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(*shape, generator=generator) for shape in ((64, 32, 3, 3), (256, 128), (64,))]
    gradients = [[torch.randn(w.shape, generator=generator) for w in start] for _ in range(3)]
    ours = [w.clone().to(bench.device) for w in start]
    ours[0] = ours[0].contiguous(memory_format=torch.channels_last)
    ours = [w.requires_grad_() for w in ours]
    optimizer = LARS(ours, 0.2, 0.9, 1e-4, 0.02)
    theirs = [w.double() for w in start]
    momentum = [torch.zeros_like(w) for w in theirs]
    for each in gradients:
        for i, (w, gradient) in enumerate(zip(ours, each, strict=True)):
            w.grad = torch.empty_like(w).copy_(gradient)
            d = gradient.double()
            if d.ndim > 1:
                d = d + 1e-4 * theirs[i]
                d = d * 0.02 * theirs[i].norm() / d.norm()
            momentum[i] = 0.9 * momentum[i] + d
            theirs[i] = theirs[i] - 0.2 * momentum[i]
        optimizer.step()
    error = max(float((w.detach().cpu().double() - x).norm() / x.norm()) for w, x in zip(ours, theirs, strict=True))
    yield Figure("LARS, three steps: relative error", error, "", (None, 1e-5))


class Rows:
    """What `pretrain.train` tells of each epoch, kept in rows.json instead of DVCLive's files."""

    def __init__(self, history: list[dict[str, float]]) -> None:
        self.history = list(history)

    def write(self, row: dict[str, float]) -> None:
        self.history.append(row)
        files.write_json("rows.json", self.history)


def train(bench: Bench, p: params.Params, stop_after: int | None = None) -> str | None:
    """Pretrain in the current project, or until `stop_after` steps; return the hash of the encoder's file."""
    begun, original = itertools.count(1), Training.update

    def update(self: Training, loss: Any) -> None:
        original(self, loss)
        if next(begun) == stop_after:
            os.kill(os.getpid(), signal.SIGUSR1)

    Training.update = update  # type: ignore[method-assign]
    try:
        pretrain.train(p, bench.device, Rows)  # type: ignore[arg-type]
    except Interrupted:
        return None
    finally:
        Training.update = original  # type: ignore[method-assign]
    return files.sha256(files.ENCODER)


@step
def right_resume(bench: Bench) -> Iterator[Figure]:
    """A run stopped in its first epoch and gone on with, against an undisturbed one: the same file, bit for bit."""
    bench.project("surfaces")
    surfaces(bench)
    p = settings(bench, batch_size=64, epochs=2)
    undisturbed = train(bench, p)
    again = train(bench, p)
    yield Figure("trained twice: files that differ", float(undisturbed != again), "", (None, 0))
    stopped = train(bench, p, stop_after=2)
    resumed = train(bench, p)
    yield Figure(
        "stopped and resumed: files that differ", float(stopped is not None or resumed != undisturbed), "", (None, 0)
    )


@step
def right_stages(bench: Bench) -> Iterator[Figure]:
    """`extract` and `finetune` on the device; features against those that the CPU computes in float32."""
    bench.project("surfaces")
    surfaces(bench)
    p = settings(bench, batch_size=64, epochs=1)
    if not files.ENCODER.exists():
        train(bench, p)
    extract.run(p)
    found = features.load("pretrained", "val").features
    encoder = model.load_encoder()[0]
    expected = features.embed(encoder, features.labelled("val"), torch.device("cpu")).features
    cosine = torch.nn.functional.cosine_similarity(found, expected).min()
    yield Figure("features on the device: least cosine", float(cosine), "", (0.9999, None))
    large = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    huge = [webdataset.Sample("huge", jpeg(large), "jpg", 0, 3000, 4000)]
    both = [features.embed(encoder.to(d), iter(huge), torch.device(d)).features for d in ("cpu", str(bench.device))]
    yield Figure("a 4000 x 3000 image: cosine", float(torch.nn.functional.cosine_similarity(*both)), "", (0.9999, None))
    finetune.run(
        dataclasses.replace(p, finetune=dataclasses.replace(p.finetune, steps=4, draws=1, supervised_budget=0.02))
    )
    tuned = files.read_json(files.FINETUNING)
    networks = 2 * len(tuned["fine_tuned"]) + (tuned["supervised"] is not None)
    yield Figure("finetune: networks that were trained", networks, "", (2, None))


@step
def right_export(bench: Bench) -> Iterator[Figure]:
    """The exported file's embeddings, by onnxruntime, against the encoder on the device."""
    try:
        from barlow.evaluation import onnx_file
    except ImportError as error:
        print(f"  not measured: {error}")
        return
    bench.project("surfaces")
    surfaces(bench)
    if not files.ENCODER.exists():
        train(bench, settings(bench, batch_size=64, epochs=1))
    pictures = [
        np.asarray(Image.open(io.BytesIO(s.data)))
        for s in itertools.islice(webdataset.read(webdataset.tars("val")), 16)
    ]
    encoder = model.load_encoder()[0]
    exported = onnx_file.Exported(encoder, {}).eval()
    onnx_file.write(exported, {"space": "gpu", "classes": "[]"}, settings(bench).export.opset, Path("encoder.onnx"))
    from barlow.encoder.encoder import Encoder

    found = torch.from_numpy(Encoder("encoder.onnx").embed(pictures))
    with torch.inference_mode():
        expected = encoder.to(bench.device)(torch.tensor(np.stack(pictures)).to(bench.device)).cpu()
    yield Figure(
        "ONNX: least cosine", float(torch.nn.functional.cosine_similarity(found, expected).min()), "", (0.9999, None)
    )


def rank(number: int, world: int, port: int, device: str, p: params.Params, folder: str) -> None:
    """Be one of several processes that train in a folder."""
    from barlow.training import distributed

    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    chosen = distributed.start(device)
    try:
        pretrain.train(p, chosen, Rows)  # type: ignore[arg-type]
    finally:
        distributed.stop()


@step
def right_processes(bench: Bench) -> Iterator[Figure]:
    """Two processes, one per GPU over NCCL (on the CPU: gloo), against one: the curve of the loss."""
    if bench.device.type == "cuda" and torch.cuda.device_count() < 2:
        print("  not measured: there is one GPU")
        return
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    p, losses = settings(bench, batch_size=64, epochs=2, lr_weights=0.02, lr_biases=0.0005, precision="fp32"), []
    for world in (1, 2):
        folder = bench.project(f"processes-{world}")
        surfaces(bench)
        torch.multiprocessing.spawn(rank, (world, port + world, bench.device.type, p, str(folder)), world)  # type: ignore[no-untyped-call]
        losses.append([row["loss"] for row in files.read_json("rows.json")])
    error = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    yield Figure("two processes against one: loss", error, "relative", (None, 1e-3))


# --- fast


class Clock:
    """Where a step's time goes, on the host and on the device, by part."""

    def __init__(self, bench: Bench) -> None:
        self.cuda = bench.device.type == "cuda"
        self.marks: list[tuple[str, float, Any]] = []

    def mark(self, name: str) -> None:
        """Say that the part `name` has just been issued."""
        event = torch.cuda.Event(enable_timing=True) if self.cuda else None
        if event is not None:
            event.record()
        self.marks.append((name, time.perf_counter(), event))

    def parts(self, steps: int) -> Iterator[tuple[str, float, float]]:
        """Yield each part with its milliseconds per step on the host and on the device."""
        host, device = dict[str, float](), dict[str, float]()
        for (_, before, first), (name, after, second) in itertools.pairwise(self.marks):
            host[name] = host.get(name, 0.0) + 1000 * (after - before)
            device[name] = device.get(name, 0.0) + (
                first.elapsed_time(second) if self.cuda else 1000 * (after - before)
            )
        yield from ((name, host[name] / steps, device[name] / steps) for name in host if name != "start")


def steps_of(bench: Bench, p: params.Params, steps: int, cpu_views: bool = False) -> tuple[Training, float, Clock]:
    """Train for some steps after a few that warm up; return the run, the seconds per step and where they went."""
    run = Training(p, bench.device)
    if cpu_views:
        run.views = views.TwinViews(webdataset.tars("pretrain"), p.views, p.pretrain.batch_size, 0)
    bf16 = model.computes_bf16(p.pretrain.precision, bench.device)
    endless = itertools.chain.from_iterable(itertools.repeat(run.views))
    clock = Clock(bench)
    run.optimizer.register_step_pre_hook(lambda *_: clock.mark("backward"))

    def some(n: int) -> None:
        clock.mark("start")
        for view_a, view_b in itertools.islice(endless, n):
            view_a, view_b = view_a.to(bench.device), view_b.to(bench.device)
            clock.mark("waiting for views")
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):
                z_a, z_b = run.twins(view_a, view_b)
            clock.mark("forward")
            loss = barlow_twins_loss(z_a, z_b, p.pretrain.lambd)
            clock.mark("loss")
            run.update(loss)
            run.record(loss, z_a, z_b)
            clock.mark("optimizer")
        bench.wait()

    some(2 if bench.tiny else 20)
    clock.marks.clear()
    started = time.perf_counter()
    some(steps)
    return run, (time.perf_counter() - started) / steps, clock


def flops(bench: Bench, run: Training, size: int, n: int = 4) -> float:
    """Return the floating-point operations of the network's forward and backward pass for one pair of views."""
    from torch.utils.flop_counter import FlopCounterMode

    pair = torch.randn(2, n, 3, size, size, device=bench.device)
    with FlopCounterMode(display=False) as counter:
        sum(z.sum() for z in run.network(*pair)).backward()
    run.optimizer.zero_grad()
    return counter.get_total_flops() / n


def matrix_rate(bench: Bench) -> float:
    """Return the floating-point operations per second of a large matrix product in bf16."""
    n = 256 if bench.tiny else 8192
    a, b = torch.randn(2, n, n, device=bench.device, dtype=torch.bfloat16)
    return 2 * n**3 / bench.seconds(lambda: a @ b, 3 if bench.tiny else 20)


def whole_steps(bench: Bench, name: str, p: params.Params, steps: int, least: float | None = None) -> Iterator[Figure]:
    """Yield pairs per second, the share of the card's matrix rate, memory, and where the time goes."""
    n = p.pretrain.batch_size
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run, seconds, clock = steps_of(bench, p, steps)
    yield Figure(f"{name}: rate", n / seconds, "pairs/s", (least, None))
    used = flops(bench, run, p.views.size) * n / seconds / matrix_rate(bench)
    yield Figure(f"{name}: MFU, of the measured bf16 matrix rate", 100 * used, "%")
    if bench.device.type == "cuda":
        yield Figure(f"{name}: memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    for part, host, device in clock.parts(steps):
        yield Figure(f"{name}: {part}, host", host, "ms/step")
        yield Figure(f"{name}: {part}, device", device, "ms/step")


def resnet18(bench: Bench, **pretraining: Any) -> params.Params:
    bench.project("cifar")
    cifar(bench)
    return settings(bench, "cifar10", batch_size=32 if bench.tiny else 512, **pretraining)


@step
def fast_resnet18(bench: Bench) -> Iterator[Figure]:
    """ResNet-18, 32 px, batch 512."""
    yield from whole_steps(
        bench, "ResNet-18", resnet18(bench), 3 if bench.tiny else 100, None if bench.tiny else 15_000
    )


@step
def fast_cpu_views(bench: Bench) -> Iterator[Figure]:
    """The same with the views made on the CPU."""
    p = resnet18(bench)
    _, seconds, _ = steps_of(bench, p, 3 if bench.tiny else 30, cpu_views=True)
    yield Figure("ResNet-18, views on the CPU", p.pretrain.batch_size / seconds, "pairs/s")


@step
def fast_compile(bench: Bench) -> Iterator[Figure]:
    """The same with torch.compile."""
    if bench.tiny:
        return
    p = resnet18(bench, compile=True)
    _, seconds, _ = steps_of(bench, p, 100)
    yield Figure("ResNet-18, compiled", p.pretrain.batch_size / seconds, "pairs/s")


@step
def fast_resnet50(bench: Bench) -> Iterator[Figure]:
    """ResNet-50, 224 px, projector 8192-8192-8192."""
    bench.project("photographs-224")
    side, n = (64, 64) if bench.tiny else (320, 1024)
    if not webdataset.tars("pretrain"):
        drawn = photographs(bench, 64, side)
        write_shard("pretrain", ((data, -1) for data in itertools.islice(itertools.cycle(drawn), n)))
    p = settings(bench, "imagenet", batch_size=16 if bench.tiny else 256)
    yield from whole_steps(bench, "ResNet-50", p, 2 if bench.tiny else 20)


@step
def fast_views(bench: Bench) -> Iterator[Figure]:
    """DALI alone."""
    for name in ("cifar", "photographs-224"):
        bench.project(name)
        if not webdataset.tars("pretrain"):
            continue
        p = settings(bench, "cifar10" if name == "cifar" else "imagenet", batch_size=32 if bench.tiny else 256)
        twins = views.TwinViews(webdataset.tars("pretrain"), p.views, p.pretrain.batch_size, 0, device_id=bench.gpu)
        endless = itertools.chain.from_iterable(itertools.repeat(twins))
        seconds = bench.seconds(lambda endless=endless: next(endless), 3 if bench.tiny else 50)
        yield Figure(f"DALI alone, {p.views.size} px", p.pretrain.batch_size / seconds, "pairs/s")


@step
def fast_loss(bench: Bench) -> Iterator[Figure]:
    """The loss, forward and backward, against the paper's pseudo-code."""
    from loss import our_loss, paper_loss
    from loss import step as once

    for n, dim in [(32, 64)] if bench.tiny else [(512, 2048), (256, 8192), (2048, 8192)]:
        pair = torch.randn(2, n, dim, device=bench.device)
        with torch.device(bench.device):
            theirs = bench.seconds(lambda pair=pair: once(paper_loss, *pair), 3)
        ours = bench.seconds(lambda pair=pair: once(our_loss, *pair), 10)
        yield Figure(f"loss N={n} D={dim}", 1000 * ours, "ms")
        yield Figure(f"loss N={n} D={dim}: times faster than the paper's", theirs / ours, "")


@step
def fast_optimizer(bench: Bench) -> Iterator[Figure]:
    """LARS on ResNet-18 and its projector: time and launches per step."""
    p = settings(bench, "cifar10")
    network = model.BarlowTwins(p.model, p.views.size).to(bench.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for w in network.parameters():
        w.grad = torch.randn_like(w)
    groups = [[w for w in network.parameters() if (w.ndim > 1) is wide] for wide in (True, False)]
    optimizer = LARS([{"params": group} for group in groups], 0.1, 0.9, 1e-4, 0.02)
    yield Figure("LARS", 1000 * bench.seconds(optimizer.step, 3 if bench.tiny else 50), "ms/step")
    if bench.device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            optimizer.step()
            bench.wait()
        launches = sum(event.count for event in profiled.key_averages() if "LaunchKernel" in event.key)
        yield Figure("LARS: kernel launches", launches, f"for {len(list(network.parameters()))} tensors")


# --- good


def knn(bench: Bench) -> Callable[[Training, params.Params], dict[str, float]]:
    """Return an `online_knn` that holds all pixels decoded: 60,000 images take a second then."""
    held = {}
    for split in ("train", "val"):
        samples = list(features.labelled(split))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(sample.data)).convert("RGB")) for sample in samples])
        held[split] = torch.from_numpy(pixels), torch.tensor([sample.label for sample in samples])

    def accuracy(run: Training, p: params.Params) -> dict[str, float]:
        every, epoch = p.pretrain.knn_epochs, run.step // run.epoch_steps
        if every is None or (epoch % every and epoch != p.pretrain.epochs):
            return {}
        encoder = model.FrozenEncoder(p.model, p.views).to(run.device)
        encoder.backbone.load_state_dict(run.network.backbone.state_dict())
        with torch.inference_mode():
            found = {
                split: torch.cat([encoder(part.to(run.device)).float() for part in pixels.split(1000)])
                for split, (pixels, _) in held.items()
            }
            labels = {split: each.to(run.device) for split, (_, each) in held.items()}
            scores = probe.knn(found["val"], found["train"], labels["train"], len(webdataset.classes()), *KNN)
        return {"knn_val_top1": probe.accuracy(scores.argmax(1), labels["val"])}

    return accuracy


@step
def good_cifar10(bench: Bench) -> Iterator[Figure]:
    """CIFAR-10 by the preset, 200 epochs; stopped when the minutes are over, gone on with at the next call."""
    epochs = 2 if bench.tiny else 200
    often, warmup = (1, 1.0) if bench.tiny else (10, 10.0)
    p = resnet18(bench, epochs=epochs, knn_epochs=often, warmup_epochs=warmup)
    before, pretrain.online_knn = pretrain.online_knn, knn(bench)
    left = max(bench.deadline - time.monotonic() - 20, 1.0)  # seconds to write the checkpoint in
    alarm = threading.Timer(left, os.kill, (os.getpid(), signal.SIGUSR1))
    alarm.daemon = True
    alarm.start()
    try:
        pretrain.train(p, bench.device, Rows)  # type: ignore[arg-type]
        done = True
    except Interrupted as reason:
        print(f"  {reason}")
        done = False
    finally:
        alarm.cancel()
        pretrain.online_knn = before
    rows = files.read_json("rows.json") if Path("rows.json").exists() else []
    for epoch, row in enumerate(rows, 1):
        if "knn_val_top1" in row:
            last = done and epoch == len(rows) and not bench.tiny and bench.cifar is not None
            yield Figure(
                f"kNN after {epoch} of {epochs} epochs", row["knn_val_top1"], "%", (84.2 if last else None, None)
            )
    if rows:
        seconds = sum(row["seconds"] for row in rows)
        yield Figure(
            "seconds of training", seconds, f"for {len(rows)} epochs", (None, None if bench.tiny or not done else 720)
        )
        yield Figure("pairs per second", float(np.median([row["samples_per_second"] for row in rows])))
    if not done:
        raise Unfinished(f"{len(rows)} of {epochs} epochs")


class Unfinished(Exception):
    """A step that goes on at the next call: its result is not kept."""


# --- all of it


def main(arguments: list[str] | None = None) -> int:
    """Run the steps that have no result yet; return 1 if a bound was missed or a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", default="right,fast,good", help=f"names or their beginnings: {', '.join(STEPS)}")
    parser.add_argument("--minutes", type=float, default=30, help="after which no step begins and training stops")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache/gpu", help="folder of gpu.json, and to work in")
    parser.add_argument(
        "--cifar", type=Path, help="archive of train/<class>/*.jpg and test/<class>/*.jpg; else drawn images"
    )
    parser.add_argument("--photos", type=Path, help="folder of JPEG photographs; else drawn images")
    parser.add_argument("--tiny", action="store_true", help="sizes that prove nothing, to rehearse")
    options = parser.parse_args(arguments)
    from barlow.training import distributed

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --device cpu --tiny rehearses the steps")
    device = distributed.local_device(options.device)
    out = options.out.resolve()
    for name in ("cifar", "photos"):
        if (path := getattr(options, name)) is not None and not path.exists():
            parser.error(f"--{name} {path} is not there")
    if unknown := [name for name in options.steps.split(",") if not any(s.startswith(name) for s in STEPS)]:
        parser.error(f"--steps {','.join(unknown)}: the steps are {', '.join(STEPS)}")
    resolved = [path and path.resolve() for path in (options.cifar, options.photos)]
    bench = Bench(device, out, options.tiny, *resolved, time.monotonic() + 60 * options.minutes)
    record, results = out / "gpu.json", dict[str, Any]()
    if record.exists():
        results = files.read_json(record)
    where = {"hardware": provenance.hardware(), "torch": torch.__version__, "device": str(device), "tiny": options.tiny}
    if results.get("where") != where:
        results = {"where": where, "steps": {}}
    print(f"{where['hardware']}, torch {where['torch']}, on {device}", flush=True)
    chosen = [name for name in STEPS if name.startswith(tuple(options.steps.split(",")))]
    good = True
    for name in chosen:
        if name in results["steps"] and not results["steps"][name].get("failed"):
            print(f"{name}: done before")
            continue
        if time.monotonic() > bench.deadline:
            print(f"{name}: no time left")
            good = False
            continue
        print(f"{name}: {(STEPS[name].__doc__ or '').splitlines()[0]}", flush=True)
        started, figures, failed = time.monotonic(), list[Figure](), ""
        try:
            for figure in STEPS[name](bench):
                figures.append(figure)
                print(figure, flush=True)
        except Unfinished as reason:
            failed = f"unfinished: {reason}"
        except Exception:
            failed = traceback.format_exc()
            print(failed, flush=True)
        good &= not failed and all(figure.holds for figure in figures)
        seconds = time.monotonic() - started
        results["steps"][name] = {
            "figures": [figure._asdict() for figure in figures],
            "seconds": seconds,
            "failed": failed,
        }
        files.write_json(record, results)
        print(f"  {seconds:.0f} s", flush=True)
    missed = [
        figure["name"]
        for result in results["steps"].values()
        for figure in result["figures"]
        if not Figure(figure["name"], figure["value"], "", tuple(figure["bound"])).holds
    ]
    broken = [name for name, result in results["steps"].items() if result["failed"]]
    print(f"missed: {', '.join(missed) or 'none'}; failed or unfinished: {', '.join(broken) or 'none'}; {record}")
    return 0 if good and not missed and not broken else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
