"""The schema of params.yaml, one frozen dataclass per section. The comments of params.yaml say what each key does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from barlow.settings.strict import Above0, Count, Fraction, NonNegative, OneOf, Positive, Range, Share

FractionPair = tuple[Fraction, Fraction]
PositivePair = tuple[Above0, Above0]
TIMM = "timm:"  # how `model.arch` of a model of timm begins
Ablation = Literal["normalisation", "invariance", "stop-gradient"]


@dataclass(frozen=True)
class Synthetic:
    """The embedded default data set, which `ingest` draws."""

    seed: Count
    size: Annotated[int, Range(16)]
    unlabelled: Count
    train: Count
    val: Count
    test: Count
    defects: Count


@dataclass(frozen=True)
class Ingest:
    """The `ingest` stage."""

    source: str
    labels: Literal["folders", "classes", "none"]
    include: Annotated[tuple[str, ...], "may be empty"]
    exclude: Annotated[tuple[str, ...], "may be empty"]
    val_fraction: Fraction
    test_fraction: Fraction
    max_pixels: Positive
    synthetic: Synthetic


@dataclass(frozen=True)
class Validate:
    """The `validate` stage."""

    min_accepted_fraction: Fraction
    min_decodable_fraction: Fraction
    max_duplicate_fraction: Fraction
    min_side: Positive
    max_side: Positive
    max_bytes: Positive
    modes: tuple[str, ...]
    formats: tuple[Literal["BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"], ...]
    min_images_per_class: Count
    brightness: tuple[NonNegative, NonNegative]
    min_contrast: NonNegative
    max_drift: Fraction


@dataclass(frozen=True)
class Shard:
    """The `shard` stage."""

    seed: Count
    max_bytes: Positive
    max_side: Positive | None


@dataclass(frozen=True)
class Views:
    """The two distorted views of each image."""

    size: Annotated[int, Range(8)]
    crop_area: tuple[Annotated[float, Range(1e-3, 1)], Annotated[float, Range(1e-3, 1)]]
    crop_ratio: PositivePair
    flip: Fraction
    jitter: Fraction
    brightness: Fraction
    contrast: Fraction
    saturation: Fraction
    hue: Annotated[float, Range(0, 0.5)]
    grayscale: Fraction
    blur: FractionPair
    blur_sigma: PositivePair
    solarize: FractionPair
    mean: tuple[float, ...]
    std: tuple[Above0, ...]


@dataclass(frozen=True)
class Model:
    """The network: backbone and projector."""

    arch: Annotated[str, OneOf("resnet10", "resnet18", "resnet34", "resnet50", f"{TIMM}*")]
    stem: Literal["imagenet", "small", "stride"]
    projector: tuple[Positive, ...]
    zero_init_residual: bool
    whiten: bool
    weights: str | None
    channels: Annotated[int, Range(1, 16)]
    bits: Literal[8, 16]


@dataclass(frozen=True)
class Pretrain:
    """The `pretrain` stage."""

    seed: Count
    epochs: Positive
    batch_size: Annotated[int, Range(2)]
    lambd: NonNegative
    ablate: Ablation | None
    microbatch: Annotated[int, Range(2)] | None
    optimizer: Literal["lars", "larc", "sgd", "adamw"]
    lr_weights: NonNegative
    lr_biases: NonNegative
    final_lr: Fraction
    warmup_epochs: NonNegative
    momentum: Fraction
    weight_decay: NonNegative
    trust_coefficient: Above0
    precision: Literal["bf16", "fp32", "auto"]
    device: Literal["cpu", "cuda", "auto"]
    processes: Positive | None
    compile: bool
    checkpoint_seconds: NonNegative
    checkpoint_steps: Positive | None
    knn_epochs: Positive | None
    min_std: Fraction
    max_correlation: Fraction


@dataclass(frozen=True)
class Extract:
    """The `extract` stage."""

    seed: Count
    baselines: bool
    weights: Annotated[tuple[str, ...], "may be empty"]


@dataclass(frozen=True)
class Evaluate:
    """The `evaluate` stage."""

    seed: Count
    knn_k: Positive
    knn_temperature: Above0
    probe_l2: tuple[NonNegative, ...]
    labels_per_class: tuple[Positive, ...]
    label_shares: tuple[Share, ...]
    draws: Count


@dataclass(frozen=True)
class Finetune:
    """The `finetune` stage."""

    seed: Count
    label_shares: tuple[Share, ...]
    draws: Count
    steps: Positive
    classifier_epochs: Positive
    batch_size: Annotated[int, Range(2)]
    lr: tuple[Above0, ...]
    momentum: Fraction
    weight_decay: NonNegative
    supervised_budget: NonNegative


@dataclass(frozen=True)
class Export:
    """The `export` stage."""

    opset: Annotated[int, Range(18, 23)]
    parity_images: Annotated[int, Range(3)]
    min_cosine: Fraction
    calibration_images: Positive
    max_accuracy_loss: Annotated[float, Range(0, 100)]
    min_neighbours: Annotated[float, Range(0, 100)]


@dataclass(frozen=True)
class Report:
    """The `report` stage."""

    images: Positive


@dataclass(frozen=True)
class Promote:
    """`barlow promote`: the checks before an encoder goes into production."""

    registry: str
    margin: Annotated[float, Range(0, 100)]
    min_effective_rank: NonNegative
    min_std: Fraction
    max_latency_ms: Above0
    max_latency_ratio: Above0
    max_bytes: Positive
    allow_other_classes: bool
    reference_images: Annotated[int, Range(10)]


@dataclass(frozen=True)
class Drift:
    """`barlow drift`: recent images against those of training."""

    recent: str | None
    seed: Count
    max_images: Annotated[int, Range(10)]
    min_images: Annotated[int, Range(10)]
    max_auc: Annotated[float, Range(0.5, 1)]
    max_p: Fraction
    breaches: Positive


@dataclass(frozen=True)
class Params:
    """The whole of `params.yaml`."""

    ingest: Ingest
    validate: Validate
    shard: Shard
    views: Views
    model: Model
    pretrain: Pretrain
    extract: Extract
    evaluate: Evaluate
    finetune: Finetune
    export: Export
    report: Report
    promote: Promote
    drift: Drift
