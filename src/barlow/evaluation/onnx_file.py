"""A network as an ONNX file: written, compared with torch, and put into its place only if the two agree."""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from barlow import __version__
from barlow.core import bands, files, provenance, webdataset
from barlow.core.bands import Pixels
from barlow.core.errors import UserError
from barlow.encoder.encoder import Encoder, Vectors, batches
from barlow.evaluation.figures import Parity, Speed
from barlow.settings.params import Export
from barlow.training import model

ODD_BATCH = 7


class Exported(nn.Module):
    """The graph that is exported: the frozen encoder and, where there are labels, the linear head on top."""

    def __init__(self, encoder: model.FrozenEncoder, head: dict[str, Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.ParameterDict(head).requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Turn images (batch, height, width, channels) into (embedding (batch, dim), and logits (batch, classes))."""
        embedding = self.encoder(images)
        if not self.head:
            return (embedding,)
        return embedding, nn.functional.linear(embedding, self.head["weight"], self.head["bias"])


def replace(path: Path, network: Exported, metadata: dict[str, str], p: Export) -> tuple[Encoder, Parity, Speed]:
    """Write the network to `path`, if it agrees with torch; else the old file stays. Return the file, opened.

    Raises:
        UserError: there are no images to compare on.
        RuntimeError: onnxruntime does not give what torch gives; the message has the figures.
    """
    pictures = _pictures(p.parity_images)
    with files.replacing(path) as temporary:
        write(network, metadata, p.opset, temporary)
        exported = Encoder(temporary)
        agreement = parity(exported, network, pictures)
        if agreement.cosine_min < p.min_cosine or agreement.predictions_equal is False:
            raise RuntimeError(
                f"the exported {metadata['kind']} differs from torch, so {path} stays as it was: smallest cosine "
                f"{agreement.cosine_min} (export.min_cosine={p.min_cosine}), largest difference "
                f"{agreement.max_abs_diff}, predictions equal: {agreement.predictions_equal}"
            )
        pace = speed(exported, _resize(pictures, network.encoder.size, network.encoder.size))
    print(
        f"{path}: smallest cosine to torch {agreement.cosine_min}, "
        f"{pace.latency_ms} ms for one image, {pace.images_per_second} images/s in batches",
        flush=True,
    )
    return exported, agreement, pace


def write(network: Exported, metadata: dict[str, str], opset: int, path: Path) -> None:
    """Write the network as one ONNX file; the same weights and metadata give the same bytes."""
    channels, dtype = network.encoder.form.channels, torch.uint8 if network.encoder.form.bits == 8 else torch.uint16
    example = torch.zeros(2, network.encoder.size + 1, network.encoder.size + 3, channels, dtype=dtype)
    program = torch.onnx.export(
        network,
        (example,),
        input_names=["images"],
        output_names=["embedding", "logits"][: 1 + bool(network.head)],
        dynamic_shapes={"images": {0: Dim("batch", min=1), 1: Dim("height", min=1), 2: Dim("width", min=1)}},
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    # torch adds its graph and source lines, with paths of this machine, in an order that changes between runs
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output):
        part.ClearField("metadata_props")
    proto.graph.ClearField("value_info")
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def parity(exported: Encoder, network: Exported, pictures: Sequence[Pixels]) -> Parity:
    """Compare onnxruntime at batches of 1, 2 and 7 with torch at its own.

    The pictures are compared as they are and resized to one odd size: pictures of different sizes never share a batch.
    """
    cosines, differences, equal = [], [], []
    side = network.encoder.size
    for variant in (pictures, _resize(pictures, 2 * side + 1, side + 3)):
        wanted, *wanted_logits = _in_torch(network, variant)
        for batch_size in (1, 2, ODD_BATCH):
            results = list(exported.run(variant, batch_size))
            embeddings = np.concatenate([embedding for embedding, _ in results])
            cosines += _cosine(wanted, embeddings)
            differences.append(np.abs(wanted - embeddings).max())
            for logits in wanted_logits:
                exported_logits = np.concatenate([values for _, values in results])
                equal.append(bool((logits.argmax(1) == exported_logits.argmax(1)).all()))
    return Parity(
        cosine_min=round(min(cosines), 9),
        max_abs_diff=float(f"{np.max(differences):.2g}"),
        images=len(pictures),
        predictions_equal=all(equal) if equal else None,
    )


def _in_torch(network: Exported, pictures: Sequence[Pixels]) -> list[Vectors]:
    """Return torch's outputs, one row per picture; neighbours of the same size share a batch."""
    parts = []
    for _, alike in itertools.groupby(pictures, key=np.shape):
        parts += [network(torch.from_numpy(np.stack(batch))) for batch in batches(alike, 64)]
    return [torch.cat(output).numpy() for output in zip(*parts, strict=True)]


def speed(exported: Encoder, pictures: Sequence[Pixels]) -> Speed:
    """Time onnxruntime on pictures of one size: the median latency of a single one, and the throughput of a batch."""
    one = _median_seconds(lambda: exported.embed(pictures[:1]), runs=51)
    many = _median_seconds(lambda: exported.embed(pictures, batch_size=len(pictures)), runs=5)
    return Speed(latency_ms=round(1000 * one, 3), images_per_second=round(len(pictures) / many, 1))


def _median_seconds(call: Callable[[], object], runs: int) -> float:
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first run allocates


def _cosine(a: Vectors, b: Vectors) -> list[float]:
    """Return the cosine between the rows of (n, dim) and (n, dim); 1 where both are 0."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)  # float32 sums err by more than the two differ
    dot, norms = (a64 * b64).sum(1), np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    cosines: list[float] = np.where(norms > 0, dot / np.where(norms > 0, norms, 1), (a == b).all(1)).tolist()
    return cosines


def _resize(pictures: Sequence[Pixels], width: int, height: int) -> list[Pixels]:
    return [bands.resized(picture, width, height) for picture in pictures]


def _pictures(count: int) -> list[Pixels]:
    """Decode `count` images, those of the val split first, in the shards' order."""
    samples = webdataset.read(tar for split in ("val", "test", "train", "pretrain") for tar in webdataset.tars(split))
    pictures = [bands.unpack(sample.data) for sample in itertools.islice(samples, count)]
    if not pictures:
        raise UserError(f"{files.SHARDS} holds no images to compare on; run `barlow shard`")
    return pictures


def metadata(
    kind: str, encoder: model.FrozenEncoder, classes: Sequence[str], data: str, recipe: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Return the metadata of the ONNX file; ONNX keeps strings only, so `classes` is JSON.

    Args:
        kind: one of `files.KINDS`.
        data: the hash of the images that the encoder was pretrained on.
        recipe: the sections of params.yaml that decide the weights.
    """
    return {
        "kind": kind,
        "version": __version__,
        **({"git_revision": commit} if (commit := provenance.commit()) else {}),
        "data_hash": data,
        "params_hash": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        "image_size": str(encoder.size),
        "channels": str(encoder.form.channels),
        "bits": str(encoder.form.bits),
        "dim": str(encoder.backbone.dim),
        "classes": json.dumps(classes, ensure_ascii=False),
        "space": embedding_space(encoder),
    }


def is_of_weights(exported: Encoder) -> bool:
    """Say whether models/encoder.safetensors is what a file was exported from, and not of a later training."""
    try:
        return embedding_space(model.load_encoder()[0]) == exported.metadata["space"]
    except UserError:  # it is gone, or of other settings
        return False


def embedding_space(encoder: model.FrozenEncoder) -> str:
    """Return 16 hex digits of a hash of weights and preprocessing: embeddings compare only within one space."""
    digest = hashlib.sha256(str(encoder.size).encode())
    for name, tensor in (*sorted(encoder.state_dict().items()), ("mean", encoder.mean), ("std", encoder.std)):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
