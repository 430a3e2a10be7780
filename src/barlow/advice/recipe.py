"""The recipe of `barlow recommend`: facts about images and machine in, settings with their reasons out.

Everything that is a matter of taste or of measurement is a constant here. `settings` and `choose` are pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import floor
from typing import Any, NamedTuple

from barlow.core.errors import UserError

# params.yaml as it is shipped, for the settings that the recipe decides: they suit the drawn data set and no other.
SYNTHETIC: dict[str, Any] = {
    "shard.max_side": None,
    "views.size": 32,
    "views.crop_area": [0.3, 1.0],
    "views.saturation": 0.2,
    "views.hue": 0.1,
    "views.grayscale": 0.5,
    "views.blur_sigma": [0.1, 1.0],
    "model.arch": "resnet10",
    "model.stem": "stride",
    "pretrain.epochs": 6,
    "pretrain.batch_size": 64,
    "pretrain.lambd": 0.002,
    "pretrain.optimizer": "lars",
    "pretrain.weight_decay": 1e-6,
    "pretrain.lr_weights": 0.6,
    "pretrain.lr_biases": 0.0144,
    "pretrain.warmup_epochs": 1,
}
RATES = ("pretrain.lr_weights", "pretrain.lr_biases")
NETWORK = ("model.arch", "model.stem")  # given weights fit no other

LARS_RATES = 0.06, 0.00144  # of weights and biases, per 256 images
ADAMW_RATE, ADAMW_BATCH = 0.001, 64  # used at that batch size; at others in proportion to its square root
STARTED = 0.1  # times these rates where training goes on from given weights, so that they are not forgotten
WEIGHT_DECAY = {"adamw": 1e-4}  # others: 1e-6
CROP_AREA = [0.5, 1.0]  # the paper has 0.08; smaller crops need more steps (benchmarks/RESULTS.md)
LAMBD, DIM = 0.03, 512  # at that size of the embedding; the loss sums D^2 terms of lambda and D others
SATURATION, HUE, GRAYSCALE = 0.2, 0.1, 0.2  # of colour images
BLUR_SIGMA = 1.0  # px, the largest at 32 px; it grows with the size, up to the next line
MAX_BLUR_SIGMA = 2.0  # px, the paper's, at 224 px
WARMUP, MAX_WARMUP = 0.1, 10  # fraction of the epochs, and epochs at most

MINUTES = {"cpu": 6.0, "cuda": 30.0}  # of pretraining, if nobody says how many
BATCH = {"cpu": 64, "cuda": 256}  # at most
MIN_BATCH = 8
BATCHES = 8  # per epoch, at least, if a smaller batch can give them
MAX_EPOCHS = 1000  # the paper's
STEPS = {"cpu": 800, "cuda": 5000}  # that a larger network must get in the minutes; else a smaller one is better
SIZES = {"cpu": (32, 48, 64), "cuda": (32, 48, 64, 96, 128, 160, 224)}  # px, at most that of the images
SMALL_SIZE = 64  # px, the largest with a stem of stride 2; above it, the ImageNet stem, which strides by 4
MANY, LONG = 20_000, 60  # images, and minutes, from which a GPU trains a ResNet-50
KEPT_SIDE = 4  # times the size: larger images are shrunk to that side when they are packed
FEW = 1000  # images below which more images help more than anything else
FEW_LABELS = 400  # labelled images of a split, below which an accuracy has an interval of 10 points and more


@dataclass(frozen=True)
class Images:
    """The images to pretrain on."""

    count: int
    side: int  # px, the median of the shorter sides
    longest: int  # px; one image in ten has a side of that and more
    grey: bool  # no image has colours, whatever the files' modes
    labelled: dict[str, int]  # images with a label, by split

    def __str__(self) -> str:
        kind = "grey" if self.grey else "colour"
        return f"{self.count:,} {kind} images with a shorter side of {self.side:,} px in the median"


@dataclass(frozen=True)
class Task:
    """What settings are chosen for."""

    images: Images
    device: str  # cpu or cuda
    minutes: float  # of pretraining
    fixed: Mapping[str, Any]  # the settings that the user has chosen, by dotted key
    started: bool = False  # from given weights, not from random ones
    dim: int = DIM  # of the embedding that the loss sees

    @property
    def batch(self) -> int:
        """The images per step: the largest power of two up to BATCH that leaves BATCHES steps per epoch."""
        batch = BATCH[self.device]
        while batch > MIN_BATCH and batch * BATCHES > self.images.count:
            batch //= 2
        return int(self.fixed.get("pretrain.batch_size", batch))

    @property
    def epoch_steps(self) -> int:
        """The steps per epoch; the last images, which fill no batch, are left out."""
        return max(self.images.count // self.batch, 1)

    def epochs(self, seconds: float) -> int:
        """Return the epochs that fit into the minutes at `seconds` per image: at least 1, at most MAX_EPOCHS."""
        return min(max(floor(60 * self.minutes / (self.epoch_steps * self.batch * seconds)), 1), MAX_EPOCHS)


def require_minutes(minutes: float | None) -> None:
    """Raise UserError where minutes are given and are not above 0."""
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes {minutes:g} is not allowed; it must be above 0")


class Network(NamedTuple):
    """What decides the time of a step, per image."""

    arch: str
    stem: str
    size: int  # px

    def __str__(self) -> str:
        return f"{self.arch}, stem {self.stem}, {self.size} px"

    def settings(self) -> dict[str, Any]:
        """Return the settings by dotted key."""
        return {"model.arch": self.arch, "model.stem": self.stem, "views.size": self.size}


Advice = dict[str, tuple[Any, str]]  # value and reason, by dotted key


def networks(task: Task) -> list[Network]:
    """Return the networks that suit the images, smallest first; what the user has chosen is in all of them."""
    images, fixed = task.images, task.fixed
    sizes = [size for size in SIZES[task.device] if size <= images.side] or [SIZES[task.device][0]]
    sizes = [fixed["views.size"]] if "views.size" in fixed else sizes
    deep = images.count >= MANY and task.minutes >= LONG
    arch = fixed.get("model.arch", "resnet10" if task.device == "cpu" else "resnet50" if deep else "resnet18")
    return [
        Network(arch, fixed.get("model.stem", "stride" if size <= SMALL_SIZE else "imagenet"), size) for size in sizes
    ]


def choose(task: Task, seconds: Callable[[Network], float]) -> Network:
    """Return the largest network that gets STEPS steps in the minutes, or the smallest if none does.

    `seconds` measures a network: the time of a training step per image.
    """
    best, *larger = networks(task)
    for network in larger:
        if task.epochs(seconds(network)) * task.epoch_steps < STEPS[task.device]:
            break
        best = network
    return best


def settings(task: Task, network: Network, seconds: float) -> Advice:
    """Return every setting that the recipe decides, with its reason; also those that the user has chosen.

    Args:
        task: what they are for. Where other settings depend on one that the user has chosen, they follow that.
        network: from `choose`.
        seconds: that a training step of this network takes, per image.
    """
    images, minutes, size = task.images, task.minutes, network.size
    device = "processor" if task.device == "cpu" else "GPU"
    advice: Advice = {}

    def decide(key: str, value: Any, reason: str) -> Any:
        advice[key] = value, reason
        return task.fixed.get(key, value)

    why = f"the images have {images.side:,} px in the median, and there is time for this size"
    if network != networks(task)[-1]:
        why = f"larger ones get fewer than {STEPS[task.device]:,} steps in {minutes:g} minutes"
    decide("views.size", size, f"px; {why}")
    decide("model.arch", network.arch, f"for {images.count:,} images in {minutes:g} minutes on a {device}")
    decide("model.stem", network.stem, f"stride is for up to {SMALL_SIZE} px, imagenet for more")
    kept = KEPT_SIDE * size
    shrink = images.longest > kept
    why = "the images are small enough to decode them quickly"
    if shrink:
        why = f"px; one in ten images has {images.longest:,} px and more, which crops of {size} px do not need"
    decide("shard.max_side", kept if shrink else None, why)

    decide("views.crop_area", [*CROP_AREA], "crops that share enough of an object, in short runs")
    colour = "the images have no colours to change" if images.grey else None
    decide("views.saturation", 0.0 if images.grey else SATURATION, colour or "the paper's")
    decide("views.hue", 0.0 if images.grey else HUE, colour or "the paper's")
    decide("views.grayscale", 0.0 if images.grey else GRAYSCALE, colour or "the paper's: colours tell things apart")
    sigma = min(BLUR_SIGMA * size / 32, MAX_BLUR_SIGMA)
    decide("views.blur_sigma", [0.1, round(sigma, 2)], f"px; grows with views.size, up to the paper's {MAX_BLUR_SIGMA}")

    few = images.count < BATCH[task.device] * BATCHES
    why = f"so that {images.count:,} images give steps" if few else f"for a {device}"
    decide("pretrain.batch_size", replace(task, fixed={}).batch, why)
    fitting = max(task.epochs(seconds), floor(task.fixed.get("pretrain.warmup_epochs", 0)) + 1)
    why = f"{minutes:g} minutes at {1 / seconds:,.0f} images/s, measured: {fitting * task.epoch_steps:,} steps"
    epochs = decide("pretrain.epochs", fitting, why)
    warmup = round(min(WARMUP * epochs, MAX_WARMUP), 2)
    decide("pretrain.warmup_epochs", warmup, f"{100 * WARMUP:g} % of the epochs, at most {MAX_WARMUP}")
    why = f"better than 0.002 on photographs, with an embedding of {DIM}; larger ones need less"
    decide("pretrain.lambd", round(LAMBD * DIM / task.dim, 5), why)
    own = any(key in task.fixed for key in RATES)  # a rate that was chosen for LARS is far too high for AdamW
    why = "as your learning rates are" if own else "in short runs on photographs its encoders are better than LARS's"
    optimizer = decide("pretrain.optimizer", "lars" if own else "adamw", why)
    decide("pretrain.weight_decay", WEIGHT_DECAY.get(optimizer, 1e-6), f"for {optimizer}")
    rates, why = LARS_RATES, "a tenth of what the drawn set needs: 2 to 12 points on photographs"
    if optimizer == "adamw":
        batch = task.batch
        rates = (round(ADAMW_RATE * (batch / ADAMW_BATCH) ** 0.5 * 256 / batch, 6),) * 2
        why = f"per 256 images: {ADAMW_RATE:g} at batches of {ADAMW_BATCH}, with the square root of larger ones"
    if task.started:
        rates = round(STARTED * rates[0], 7), round(STARTED * rates[1], 7)
        why = f"{STARTED:g} times the rate for random weights, since model.weights gives others"
    decide("pretrain.lr_weights", rates[0], why)
    decide("pretrain.lr_biases", rates[1], f"for {optimizer}, with these lr_weights")
    return advice


def remarks(task: Task, advice: Advice, seconds: float) -> list[str]:
    """Return lines on what to expect of the settings: steps, time, and how sure accuracies will be."""
    epochs = task.fixed.get("pretrain.epochs", advice["pretrain.epochs"][0])
    steps, labelled = epochs * task.epoch_steps, task.images.labelled
    needed = steps * task.batch * seconds / 60
    lines = [f"{task.images.count:,} images train for {steps:,} steps, in about {needed:.1f} minutes."]
    if needed > 1.05 * task.minutes:
        lines.append(f"That is more than {task.minutes:g} minutes.")
    if steps < STEPS[task.device]:
        lines.append(f"Fewer than {STEPS[task.device]:,} steps make a weak encoder: give it more time by --minutes.")
    if task.images.count < FEW:
        lines.append("So few images do not make a good encoder: more of them, with or without labels, help most.")
    if not all(labelled.get(split) for split in ("train", "val", "test")):
        return [*lines, "train, val or test has no labels: no accuracy will be measured (docs/own-images.md)."]
    for split in ("val", "test"):
        if (n := labelled[split]) < FEW_LABELS:
            lines.append(f"{split} has {n} labelled images: accuracies are uncertain by {98 / n**0.5:.0f} points.")
    return lines
