"""The fine-tuned classifier: written as ONNX, and measured beside the linear probe on the encoder it began from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from barlow.core import files, webdataset
from barlow.encoder.encoder import Encoder
from barlow.evaluation import features, figures, intervals, onnx_file, probe
from barlow.evaluation.exported import outputs
from barlow.evaluation.features import Split
from barlow.evaluation.figures import Accuracy, Gain, Images, Parity, Speed
from barlow.evaluation.onnx_file import Exported
from barlow.settings.params import Params
from barlow.training import distributed
from barlow.training.model import FrozenEncoder


class Tuned(NamedTuple):
    """A network that was trained on labels, and how."""

    encoder: FrozenEncoder
    head: dict[str, Tensor]  # weight (classes, dim) and bias (classes,)
    lr: float
    steps: int


@dataclass(frozen=True)
class Accuracies:
    """Accuracies on val, on which settings were chosen, and on test."""

    val: Accuracy
    test: Accuracy


@dataclass(frozen=True)
class Classifying:
    """The content of reports/classifier.json."""

    sha256: str  # of models/classifier.onnx
    images: Images
    classes: int
    steps: int
    lr: float  # chosen on val
    refitted: bool  # whether the head was fitted again on the trained network, which val chooses
    classifier: Accuracies
    linear: Accuracies  # the linear probe on the frozen encoder that the classifier began from
    difference: Gain  # classifier minus linear probe, on test
    parity: Parity
    speed: Speed


def write(tuned: Tuned, start: FrozenEncoder, trained: dict[str, Any], p: Params) -> None:
    """Write models/classifier.onnx and reports/classifier.json, and print how both compare.

    Args:
        tuned: the fine-tuned network.
        start: the encoder that it began from.
        trained: the metadata of that encoder's file.
        p: all settings.

    Raises:
        RuntimeError: onnxruntime does not give what torch gives; the message has the figures.
    """
    classes, device = webdataset.classes(), distributed.local_device()
    frozen, own = (
        {name: features.embed(encoder.to(device), features.labelled(name), device) for name in names}
        for encoder, names in ((start, ("train", "val", "test")), (tuned.encoder, ("train", "val")))
    )
    head, refitted = best_head(tuned.head, own["train"], own["val"], len(classes), p)
    network = Exported(tuned.encoder.cpu(), head).eval()
    recipe = [*(trained[section] for section in ("model", "views", "pretrain")), asdict(p.finetune)]
    metadata = onnx_file.metadata("classifier", network.encoder, classes, trained["data"], recipe)
    metadata["labels_hash"] = webdataset.digest(webdataset.tars("train"))  # of the images and labels it learnt from
    metadata["pretrained_space"] = onnx_file.embedding_space(start.cpu())
    _, parity, speed = onnx_file.replace(files.CLASSIFIER, network, metadata, p.export)

    encoder, labels, predicted = Encoder(files.CLASSIFIER), {}, {}
    for name in ("val", "test"):
        embedded, logits = outputs(encoder, features.labelled(name))
        labels[name], predicted[name] = embedded.labels, logits.argmax(1)
    weight, bias, _ = probe.choose_linear(frozen["train"][:2], frozen["val"][:2], len(classes), p.evaluate.probe_l2)
    linear = {name: (frozen[name].features @ weight.T + bias).argmax(1) for name in labels}

    measured = Classifying(
        sha256=files.sha256(files.CLASSIFIER),
        images=Images(len(frozen["train"].labels), len(labels["val"]), len(labels["test"])),
        classes=len(classes),
        steps=tuned.steps,
        lr=tuned.lr,
        refitted=refitted,
        classifier=_accuracies(predicted, labels),
        linear=_accuracies(linear, labels),
        difference=intervals.gain(predicted["test"] == labels["test"], linear["test"] == labels["test"]),
        parity=parity,
        speed=speed,
    )
    figures.write(files.CLASSIFYING, measured)
    print(words(measured), flush=True)


def best_head(
    head: dict[str, Tensor], train: Split, val: Split, classes: int, p: Params
) -> tuple[dict[str, Tensor], bool]:
    """Return the head that is better on val, and whether it is a linear probe fitted on the network's features.

    The trained head learnt from distorted crops, the probe learns from whole images, which are what the classifier will
    see (Touvron et al., arXiv 1906.06423, fit the classifier again for the same reason).
    """
    weight, bias, _ = probe.choose_linear(train[:2], val[:2], classes, p.evaluate.probe_l2)
    refitted = {"weight": weight, "bias": bias}
    trained_top1, refitted_top1 = (
        probe.accuracy((val.features @ each["weight"].T + each["bias"]).argmax(1), val.labels)
        for each in (head, refitted)
    )
    return (refitted, True) if refitted_top1 > trained_top1 else (head, False)


def read() -> Classifying:
    """Return what `write` measured; raises as `figures.read` does."""
    return figures.read(Classifying, files.CLASSIFYING)


def _accuracies(predicted: dict[str, Tensor], labels: dict[str, Tensor]) -> Accuracies:
    return Accuracies(**{name: intervals.accuracy(predicted[name] == each) for name, each in labels.items()})


def words(measured: Classifying) -> str:
    """Return both accuracies as lines of text, and which of the two is the better choice."""
    rows = {f"fine-tuned, learning rate {measured.lr:g}": measured.classifier, "linear probe": measured.linear}
    lines = [f"{'':<34}{'val':>22}{'test':>22}"]
    lines += [f"{title:<34}{each.val!s:>22}{each.test!s:>22}" for title, each in rows.items()]
    if measured.difference.low > 0:
        lines.append(f"{files.CLASSIFIER} beats the linear probe by {measured.difference} on test")
    else:
        lines.append(
            f"{files.CLASSIFIER} is not better than the linear probe on test: {measured.difference}. "
            f"Prefer {files.ONNX}: its logits are that probe"
        )
    return "\n".join(lines)
