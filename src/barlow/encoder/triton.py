"""A model repository for Triton Inference Server (`tritonserver --model-repository models/triton`).

For deployments that outgrow `barlow serve`. Both speak the same protocol.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from barlow.core import files
from barlow.encoder.encoder import Encoder

MAX_BATCH = 64
QUEUE_DELAY = 500  # microseconds that an image waits for others to fill a batch

CONFIG = """\
name: "encoder"
platform: "onnxruntime_onnx"
max_batch_size: {max_batch}
input [ {{ name: "images" data_type: TYPE_UINT{bits} dims: [ -1, -1, {channels} ] }} ]
output [
  {outputs}
]
dynamic_batching {{ max_queue_delay_microseconds: {delay} }}
"""


def write(onnx: Path, repository: Path) -> None:
    """Write `encoder/config.pbtxt`, `encoder/1/model.onnx` and, if there are classes, `encoder/classes.txt`.

    Triton batches requests whose images have the same size.
    """
    encoder = Encoder(onnx)
    names = repository / "encoder/classes.txt"
    outputs = [f'{{ name: "embedding" data_type: TYPE_FP32 dims: [ {encoder.dim} ] }}']
    (repository / "encoder/1").mkdir(parents=True, exist_ok=True)
    if encoder.classes is not None:
        shape = f"data_type: TYPE_FP32 dims: [ {len(encoder.classes)} ]"
        outputs.append(f'{{ name: "logits" {shape} label_filename: "classes.txt" }}')
        with files.replacing(names) as temporary:
            temporary.write_text("\n".join(encoder.classes) + "\n", encoding="utf-8")
    else:
        names.unlink(missing_ok=True)
    with files.replacing(repository / "encoder/1/model.onnx") as temporary:
        shutil.copyfile(onnx, temporary)
    with files.replacing(repository / "encoder/config.pbtxt") as temporary:
        numbers = {"max_batch": MAX_BATCH, "delay": QUEUE_DELAY, **encoder.form._asdict()}
        temporary.write_text(CONFIG.format(outputs=",\n  ".join(outputs), **numbers))
