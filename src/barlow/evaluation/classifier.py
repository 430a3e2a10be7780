"""The fine-tuned classifier: written as ONNX, and measured beside the linear probe on the encoder it began from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from barlow.core import files, webdataset
from barlow.encoder.encoder import Encoder
from barlow.evaluation import features, figures, intervals, onnx_file, probe
from barlow.evaluation.exported import outputs
from barlow.evaluation.figures import Accuracy, Images, Parity, Speed
from barlow.evaluation.intervals import Difference
from barlow.evaluation.onnx_file import Exported
from barlow.settings.params import Params
from barlow.training import distributed
from barlow.training.model import FrozenEncoder


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
    classifier: Accuracies
    linear: Accuracies  # the linear probe on the frozen encoder that the classifier began from
    difference: Difference  # classifier minus linear probe, on test
    parity: Parity
    speed: Speed


def write(network: Exported, start: FrozenEncoder, trained: dict[str, Any], lr: float, steps: int, p: Params) -> None:
    """Write models/classifier.onnx and reports/classifier.json, and print how both compare.

    Args:
        network: the classifier, on the CPU.
        start: the encoder that it began from.
        trained: the metadata of that encoder's file.
        lr: the learning rate that was chosen.
        steps: the number of batches it was trained on.
        p: all settings.

    Raises:
        RuntimeError: onnxruntime does not give what torch gives; the message has the figures.
    """
    classes = webdataset.classes()
    recipe = [*(trained[section] for section in ("model", "views", "pretrain")), asdict(p.finetune)]
    metadata = onnx_file.metadata("classifier", network.encoder, classes, trained["data"], recipe)
    metadata["labels_hash"] = webdataset.digest(webdataset.tars("train"))  # of the images and labels it learnt from
    metadata["pretrained_space"] = onnx_file.embedding_space(start)
    parity, speed = onnx_file.replace(files.CLASSIFIER, network, metadata, p.export)

    encoder, device = Encoder(files.CLASSIFIER), distributed.local_device()
    labels, own = {}, {}
    for split in ("val", "test"):
        embedded, logits = outputs(encoder, features.labelled(split))
        labels[split], own[split] = embedded.labels, logits.argmax(1)
    frozen = {name: features.embed(start.to(device), features.labelled(name), device) for name in ("train", *labels)}
    weight, bias, _ = probe.choose_linear(frozen["train"][:2], frozen["val"][:2], len(classes), p.evaluate.probe_l2)
    linear = {name: (frozen[name].features @ weight.T + bias).argmax(1) for name in labels}

    measured = Classifying(
        sha256=files.sha256(files.CLASSIFIER),
        images=Images(len(frozen["train"].labels), len(labels["val"]), len(labels["test"])),
        classes=len(classes),
        steps=steps,
        lr=lr,
        classifier=_accuracies(own, labels),
        linear=_accuracies(linear, labels),
        difference=intervals.difference(own["test"] == labels["test"], linear["test"] == labels["test"]),
        parity=parity,
        speed=speed,
    )
    figures.write(files.CLASSIFYING, measured)
    print(words(measured), flush=True)


def read() -> Classifying:
    """Return what `write` measured; raises as `figures.read` does."""
    return figures.read(Classifying, files.CLASSIFYING)


def _accuracies(predicted: dict[str, Tensor], labels: dict[str, Tensor]) -> Accuracies:
    return Accuracies(
        **{
            name: intervals.mean_accuracy([probe.accuracy(predicted[name], each)], len(each))
            for name, each in labels.items()
        }
    )


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
