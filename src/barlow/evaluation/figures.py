"""The metrics that stages write as JSON, nested by what they measure: one frozen dataclass per file.

Accuracies and their intervals are in percent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from barlow.core import files
from barlow.core.errors import UserError
from barlow.settings import strict


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy with its 95 % confidence interval."""

    top1: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.top1:.1f} ({self.low:.1f} to {self.high:.1f})"


@dataclass(frozen=True)
class Budget:
    """A label budget: a number of labelled images per class, or a share of each class; the other one is None."""

    per_class: int | None
    share: float | None  # 0 to 1

    @property
    def each(self) -> int | float:
        """The number or the share, as `probe.draw_labels` takes it."""
        return self.per_class if self.per_class is not None else self.share or 0.0

    def __str__(self) -> str:
        return f"{self.per_class} per class" if self.per_class is not None else f"{100 * (self.share or 0):g} %"


@dataclass(frozen=True)
class Health:
    """Properties of features that need no labels."""

    images: int
    effective_rank: float
    std: float
    correlation: float
    alignment: float
    uniformity: float


@dataclass(frozen=True)
class FewLabels:
    """Linear probes fitted on a label budget: the mean over the draws of labelled images."""

    budget: Budget
    images: int  # labelled ones, per draw
    linear: Accuracy


@dataclass(frozen=True)
class Scores:
    """What one encoder's frozen features are worth; without labels, `health` alone."""

    linear: Accuracy | None
    knn: Accuracy | None
    knn_val: Accuracy | None  # kNN on val, by which `barlow tune` chooses: choices never see test
    l2: float | None  # weight decay of the linear probe, chosen on val
    few_labels: dict[str, FewLabels]  # by str(budget)
    health: Health | None  # None for pixels


@dataclass(frozen=True)
class Images:
    """Labelled images per split."""

    train: int
    val: int
    test: int


@dataclass(frozen=True)
class Gain:
    """How many points of accuracy one encoder is above another on the same images, with the paired 95 % interval."""

    points: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.points:+.1f} points ({self.low:+.1f} to {self.high:+.1f})"


@dataclass(frozen=True)
class Evaluation:
    """The content of reports/evaluate.json."""

    classes: int
    images: Images
    encoders: dict[
        str, Scores
    ]  # "pretrained" and, unless extract.baselines is off, "random" and "pixels"; and given weights
    gains: dict[str, dict[str, Gain]]  # of pretrained over each other encoder: "linear" and "knn"; empty without labels


@dataclass(frozen=True)
class Network:
    """A whole network trained on labels, with the learning rate that was chosen on val."""

    accuracy: Accuracy
    lr: float


@dataclass(frozen=True)
class FineTuned:
    """Networks trained on a label budget, from pretrained and from random weights."""

    budget: Budget
    images: int  # labelled ones, per draw
    pretrained: Network
    random: Network


@dataclass(frozen=True)
class Supervised:
    """A network trained from random weights on all labels."""

    network: Network
    images_seen: int  # steps x batch size


@dataclass(frozen=True)
class FineTuning:
    """reports/finetune.json; without labels, `seconds` alone."""

    seconds: float
    fine_tuned: dict[str, FineTuned]  # by str(budget)
    supervised: Supervised | None


@dataclass(frozen=True)
class Parity:
    """How closely onnxruntime agrees with torch."""

    cosine_min: float
    max_abs_diff: float
    images: int
    predictions_equal: bool | None  # None without a head


@dataclass(frozen=True)
class Speed:
    """Speed of onnxruntime: median latency of a single image, throughput of a batch."""

    latency_ms: float
    images_per_second: float


@dataclass(frozen=True)
class Top1:
    """Top-1 accuracies on the test images of an exported file."""

    linear: float  # by the logits in the file
    knn: float


@dataclass(frozen=True)
class Precision:
    """One exported file; without labels its accuracy is unknown."""

    top1: Top1 | None
    neighbours: float | None  # percent of nearest neighbours in common with float32; None of fewer than two images
    bytes: int
    written: bool  # False if it lost too much accuracy or, without labels, too many neighbours


@dataclass(frozen=True)
class Exporting:
    """reports/export.json."""

    parity: Parity
    speed: Speed
    precision: dict[str, Precision]  # "float32", which is models/encoder.onnx, "int8" and "fp16"
    dim: int
    parameters: int


@dataclass(frozen=True)
class Candidate:
    """What the gate measured of one encoder; without labels, no accuracies."""

    logits: Accuracy | None  # of a classifier, whose network and head were trained together
    linear: Accuracy | None
    knn: Accuracy | None
    effective_rank: float
    std: float


Kind = TypeVar("Kind")


def read(kind: type[Kind], path: Path) -> Kind:
    """Read a JSON file of metrics.

    Raises:
        FileNotFoundError: there is none.
        UserError: its keys are not those of `kind`; the message names the file, the key and the value.
    """
    return build(kind, document(path), str(path))


def document(path: Path) -> Any:
    """Read a JSON file of metrics as it is.

    Raises:
        FileNotFoundError: there is none.
        UserError: the file is damaged.
    """
    try:
        return files.read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not whole JSON ({error}); run `barlow {path.stem}` again") from None


def build(kind: type[Kind], document: Any, file: str) -> Kind:
    """Turn a parsed JSON document into a dataclass; `file` is named in errors (UserError)."""
    built: Kind = strict.build(kind, document, file)
    return built


def write(path: Path, metrics: Any) -> None:
    """Write a dataclass of metrics as JSON."""
    files.write_json(path, asdict(metrics))


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names; a list is a leaf."""
    if not isinstance(value, dict):
        return {name: value}
    return {
        path: leaf for key, part in value.items() for path, leaf in leaves(part, f"{name}.{key}".lstrip(".")).items()
    }
