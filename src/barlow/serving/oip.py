"""Bodies of the Open Inference Protocol, version 2, with its binary tensor extension: reads requests, writes answers.

https://github.com/kserve/open-inference-protocol and Triton's protocol/extension_binary_data.md. A body is JSON, or
JSON followed by the tensors' bytes; in the second case the header HEADER has the length of the JSON.
"""

from __future__ import annotations

import math
import reprlib
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import orjson

from barlow.core.bands import RGB, PixelFormat, Pixels
from barlow.encoder.encoder import Encoder, Vectors
from barlow.serving.limits import RequestError
from barlow.settings.flags import Flags

HEADER = "Inference-Header-Content-Length"
INPUT = "images"


class Request(NamedTuple):
    """A request for inference."""

    id: str | None
    images: Pixels  # (batch, height, width, channels)
    outputs: list[tuple[str, bool]]  # name, and whether the client wants it in binary


def datatype(form: PixelFormat) -> str:
    """Return the protocol's name of the images' type: UINT8 or UINT16."""
    return f"UINT{form.bits}"


def outputs(encoder: Encoder) -> dict[str, int]:
    """Return {name: length of one image's vector} of the encoder's outputs."""
    return {"embedding": encoder.dim} | ({"logits": len(encoder.classes)} if encoder.classes is not None else {})


def metadata(encoder: Encoder, version: str) -> dict[str, Any]:
    """Return the protocol's model metadata."""
    return {
        "name": "encoder",
        "versions": [version],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": INPUT, "datatype": datatype(encoder.form), "shape": [-1, -1, -1, encoder.form.channels]}],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, n]} for name, n in outputs(encoder).items()],
        "parameters": encoder.metadata,
    }


def parse(body: bytes, header: str | None, names: Sequence[str], flags: Flags, form: PixelFormat = RGB) -> Request:
    """Read a request body; `header` is the value of HEADER, `names` are the encoder's outputs, `form` its input.

    Raises:
        RequestError: the body does not follow the protocol (400) or is beyond a limit (413); the message says where.
    """
    length = len(body)
    if header is not None:
        if not (header.isascii() and header.isdigit() and len(header) < 19 and int(header) <= len(body)):
            raise _bad(f"the header {HEADER} is {header[:20]!r}, not a length of at most the {len(body)} bytes sent")
        length = int(header)
    try:
        request = orjson.loads(memoryview(body)[:length])
    except orjson.JSONDecodeError as error:
        raise _bad(f"the body is no JSON: {error}") from None
    request, parameters = _object(request, "the body"), _object(request, "the body").get("parameters", {})
    id_ = request.get("id")
    if id_ is not None and not isinstance(id_, str):
        raise _bad("id must be a string")
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise _bad(f"inputs must be a list of one tensor, {INPUT!r}")
    images = _images(_object(inputs[0], "inputs[0]"), memoryview(body)[length:], flags, form)
    default = bool(_object(parameters, "parameters").get("binary_data_output", False))
    wanted = request.get("outputs")
    if wanted is None:
        return Request(id_, images, [(name, default) for name in names])
    if not isinstance(wanted, list):
        raise _bad("outputs must be a list")
    chosen = list[tuple[str, bool]]()
    for i, entry in enumerate(wanted):
        output = _object(entry, f"outputs[{i}]")
        if output.get("name") not in names:
            raise _bad(f"outputs[{i}].name is {_shown(output.get('name'))}; there are: {', '.join(names)}")
        if any(output["name"] == name for name, _ in chosen):  # or a short request could ask for an endless answer
            raise _bad(f"outputs[{i}].name is {output['name']!r} again; ask for each output once")
        binary = _object(output.get("parameters", {}), f"outputs[{i}].parameters").get("binary_data", default)
        chosen.append((output["name"], bool(binary)))
    return Request(id_, images, chosen)


def _images(tensor: dict[str, Any], binary: memoryview, flags: Flags, form: PixelFormat) -> Pixels:
    """Return the input tensor as an array (batch, height, width, channels)."""
    kind = datatype(form)
    shape = tensor.get("shape")
    if tensor.get("name") != INPUT or tensor.get("datatype") != kind:
        name, given = _shown(tensor.get("name")), _shown(tensor.get("datatype"))
        raise _bad(f"inputs[0] is {name}, {given}; it must be {INPUT!r}, {kind!r}")
    if (
        not isinstance(shape, list)
        or len(shape) != 4
        or not all(type(n) is int and n > 0 for n in shape)
        or shape[3] != form.channels
    ):
        raise _bad(f"inputs[0].shape is {_shown(shape)}; it must be [batch, height, width, {form.channels}]")
    batch, height, width, _ = shape
    if batch > flags.max_images:
        raise RequestError(413, "images", f"{batch} images; at most {flags.max_images} are allowed in a request")
    if height * width > flags.max_pixels:
        raise RequestError(413, "pixels", f"{width} x {height} pixels, more than the {flags.max_pixels} allowed")
    size = _object(tensor.get("parameters", {}), "inputs[0].parameters").get("binary_data_size")
    if size is not None:
        if "data" in tensor or size != len(binary) or size != math.prod(shape) * form.dtype.itemsize:
            raise _bad(f"inputs[0] has {len(binary)} bytes for binary_data_size {_shown(size)} and shape {shape}")
        return np.frombuffer(binary, form.dtype).reshape(shape)
    if len(binary):
        raise _bad(f"{len(binary)} bytes follow the JSON, and inputs[0].parameters has no binary_data_size")
    values = _flat(tensor.get("data"), shape)
    try:
        if len(values) == math.prod(shape) and set(map(type, values)) == {int}:
            if form.bits == 8:
                return np.frombuffer(bytes(values), np.uint8).reshape(shape)
            return np.frombuffer(array("H", values), np.uint16).reshape(shape)
    except (ValueError, OverflowError):  # a number is too large, or negative
        pass
    raise _bad(
        f"inputs[0].data must be {math.prod(shape)} whole numbers from 0 to {form.white}, flat or nested as the shape"
    )


def _flat(data: Any, shape: Sequence[int]) -> list[Any]:
    """Return the numbers of lists that are flat or nested like the shape; an empty list if they are neither."""
    values = data if isinstance(data, list) else []
    for n in shape[1:]:
        if not values or not isinstance(values[0], list):
            break
        if not all(isinstance(row, list) and len(row) == n for row in values):
            return []
        values = [*chain.from_iterable(values)]
    return values


def render(request: Request, tensors: dict[str, Vectors], version: str) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of the answer."""
    described, tail = [], []
    for name, binary in request.outputs:
        values = tensors[name]
        entry: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": [*values.shape]}
        if binary:
            tail.append(values.tobytes())
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = np.ascontiguousarray(values).ravel()
        described.append(entry)
    answer = {"model_name": "encoder", "model_version": version, "outputs": described}
    if request.id is not None:
        answer["id"] = request.id
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not tail:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *tail]), {"Content-Type": "application/octet-stream", HEADER: str(len(head))}


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(f"{where} must be a JSON object")
    return value


def _shown(value: Any) -> str:
    """Return the first 80 characters of a value, whatever its size and depth."""
    return f"{reprlib.repr(value):.80}"


def _bad(message: str) -> RequestError:
    return RequestError(400, "protocol", message)
