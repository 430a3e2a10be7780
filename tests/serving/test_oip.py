import json
import re

import numpy as np
import pytest

from barlow.core.bands import PixelFormat
from barlow.encoder.encoder import Encoder
from barlow.serving import oip
from barlow.serving.limits import RequestError
from barlow.settings.flags import Flags

KNOWN = ["embedding", "logits"]
FIVE = PixelFormat(5, 16)


def tensor(**changed):
    """Return a good input with changed keys; the value None removes a key."""
    good = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 2, 3], "data": [1, 2, 3, 4, 5, 6]}
    return {key: value for key, value in (good | changed).items() if value is not None}


def parse(document, header=None, tail=b"", **flags):
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return oip.parse(body + tail, header, KNOWN, Flags(**flags))


def binary(array, **document):
    """Return a binary request, body and header, as the extension describes it."""
    given = tensor(shape=[*array.shape], data=None, parameters={"binary_data_size": array.nbytes})
    head = json.dumps({"inputs": [given], **document}).encode()
    return head + array.tobytes(), str(len(head))


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 5, 4, 3), (3, 1, 7, 3), (64, 2, 2, 3), (1, 90, 110, 3)])
@pytest.mark.parametrize("form", ["binary", "flat", "nested"])
def test_tensors_come_through_as_they_are(shape, form):
    images = np.random.default_rng(shape[0]).integers(0, 256, shape, dtype=np.uint8)
    if form == "binary":
        body, header = binary(images)
        request = oip.parse(body, header, KNOWN, Flags())
    else:
        data = (images.ravel() if form == "flat" else images).tolist()
        request = parse({"inputs": [tensor(shape=[*shape], data=data)]})
    assert request.images.dtype == np.uint8
    np.testing.assert_array_equal(request.images, images)


def sixteen(tail=b"", **changed):
    """Parse a request of one image of 1 x 2 px with five channels of 16 bits, with changed keys."""
    good = {"datatype": "UINT16", "shape": [1, 1, 2, 5], "data": [0, 1, 255, 256, 65535] * 2}
    body = json.dumps({"inputs": [tensor(**good | changed)]}).encode()
    return oip.parse(body + tail, str(len(body)) if tail else None, KNOWN, Flags(), FIVE).images


def test_tensors_of_16_bits_come_through_as_they_are():
    wanted = np.array([0, 1, 255, 256, 65535] * 2, "<u2").reshape(1, 1, 2, 5)
    size = {"data": None, "parameters": {"binary_data_size": 20}}
    for images in (sixteen(), sixteen(data=wanted.tolist()), sixteen(tail=wanted.tobytes(), **size)):
        assert images.dtype == np.uint16
        np.testing.assert_array_equal(images, wanted)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"datatype": "UINT8"}, "inputs[0] is 'images', 'UINT8'; it must be 'images', 'UINT16'"),
        ({"shape": [1, 1, 2, 3]}, "inputs[0].shape is [1, 1, 2, 3]; it must be [batch, height, width, 5]"),
        ({"data": [65536] * 10}, "inputs[0].data must be 10 whole numbers from 0 to 65535"),
        ({"data": [-1] * 10}, "inputs[0].data must be 10 whole numbers from 0 to 65535"),
        ({"data": None, "parameters": {"binary_data_size": 10}, "tail": bytes(10)}, "inputs[0] has 10 bytes"),
    ],
)
def test_other_tensors_than_the_encoders_are_refused(changed, reason):
    with pytest.raises(RequestError, match=re.escape(reason)) as refused:
        sixteen(**changed)
    assert refused.value.status == 400


def test_outputs_are_all_or_those_asked_for():
    assert parse({"inputs": [tensor()]})[::2] == (None, [("embedding", False), ("logits", False)])
    everything = parse({"inputs": [tensor()], "id": "é 7", "parameters": {"binary_data_output": True}})
    assert everything[::2] == ("é 7", [("embedding", True), ("logits", True)])
    outputs = [{"name": "logits", "parameters": {"binary_data": False}}, {"name": "embedding"}]
    chosen = parse({"inputs": [tensor()], "outputs": outputs, "parameters": {"binary_data_output": True}})
    assert chosen.outputs == [("logits", False), ("embedding", True)]


def test_answers_are_what_the_protocol_says():
    vectors = {name: np.random.default_rng(i).normal(size=(3, 4 + i)).astype("f4") for i, name in enumerate(KNOWN)}
    asked = parse({"inputs": [tensor()], "id": "7"})
    body, headers = oip.render(asked, vectors, "v3")
    answer = json.loads(body)
    assert headers == {"Content-Type": "application/json"}
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("encoder", "v3", "7")
    for output, name in zip(answer["outputs"], KNOWN, strict=True):
        values = np.array(output.pop("data"), np.float32).reshape(vectors[name].shape)
        np.testing.assert_array_equal(values, vectors[name])  # the shortest decimals that give the same float
        assert output == {"name": name, "datatype": "FP32", "shape": [*vectors[name].shape]}


def test_binary_answers_follow_their_json():
    vectors = {name: np.random.default_rng(i).normal(size=(3, 4 + i)).astype("f4") for i, name in enumerate(KNOWN)}
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "embedding"}]
    body, headers = oip.render(parse({"inputs": [tensor()], "outputs": outputs}), vectors, "v3")
    length = int(headers["Inference-Header-Content-Length"])
    answer, tail = json.loads(body[:length]), body[length:]
    assert headers["Content-Type"] == "application/octet-stream"
    assert "id" not in answer
    assert [output["name"] for output in answer["outputs"]] == ["logits", "embedding"]
    assert answer["outputs"][0]["parameters"] == {"binary_data_size": 60}
    np.testing.assert_array_equal(np.frombuffer(tail, "<f4").reshape(3, 5), vectors["logits"])


def test_metadata_tells_what_the_encoder_has(tmp_path, mean_onnx):
    encoder = Encoder(mean_onnx(tmp_path / "a.onnx", ["a", "b", "c"]))
    answer = oip.metadata(encoder, "v3")
    assert (answer["name"], answer["versions"]) == ("encoder", ["v3"])
    assert [(output["name"], output["shape"]) for output in answer["outputs"]] == [
        ("embedding", [-1, 3]),
        ("logits", [-1, 3]),
    ]
    assert oip.outputs(Encoder(mean_onnx(tmp_path / "b.onnx"))) == {"embedding": 3}


DEEP = b"[" * 1000 + b"]" * 1000  # as deep as the JSON parser goes, and Python's repr does not
WHOLE = r"inputs\[0\].data must be 6 whole numbers from 0 to 255, flat or nested as the shape"
MALFORMED = [
    (b"", 400, "the body is no JSON"),
    (b"[" * 100_000, 400, "the body is no JSON: depth"),
    (b'{"id": NaN}', 400, "the body is no JSON: .* line 1 column"),
    (b'{"id": 1e999}', 400, "the body is no JSON: "),
    (b'{"id": "\xff"}', 400, "the body is no JSON: "),
    ([], 400, "the body must be a JSON object"),
    ({}, 400, "inputs must be a list of one tensor, 'images'"),
    ({"inputs": {}}, 400, "inputs must be a list of one tensor"),
    ({"inputs": [tensor(), tensor()]}, 400, "inputs must be a list of one tensor"),
    ({"inputs": [1]}, 400, r"inputs\[0\] must be a JSON object"),
    ({"inputs": [tensor()], "id": 7}, 400, "id must be a string"),
    ({"inputs": [tensor()], "parameters": None}, 400, "parameters must be a JSON object"),
    ({"inputs": [tensor()], "outputs": {}}, 400, "outputs must be a list"),
    ({"inputs": [tensor()], "outputs": ["logits"]}, 400, r"outputs\[0\] must be a JSON object"),
    (
        {"inputs": [tensor()], "outputs": [{"name": "x"}]},
        400,
        r"outputs\[0\].name is 'x'; there are: embedding, logits",
    ),
    ({"inputs": [tensor()], "outputs": [{"name": "logits"}] * 2}, 400, r"outputs\[1\].name is 'logits' again"),
    (
        {"inputs": [tensor()], "outputs": [{"name": "logits", "parameters": 1}]},
        400,
        r"outputs\[0\].parameters must be a JSON object",
    ),
    ({"inputs": [tensor(name="x")]}, 400, r"inputs\[0\] is 'x', 'UINT8'; it must be 'images', 'UINT8'"),
    ({"inputs": [tensor(datatype="FP32")]}, 400, r"inputs\[0\] is 'images', 'FP32'"),
    (b'{"inputs": [{"name": %s}]}' % DEEP, 400, r"inputs\[0\] is \[\["),
    (b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": %s}]}' % DEEP, 400, r"inputs\[0\].shape is \[\["),
    ({"inputs": [tensor(shape=None)]}, 400, r"inputs\[0\].shape is None; it must be \[batch, height, width, 3\]"),
    ({"inputs": [tensor(shape=[1, 2, 3])]}, 400, r"inputs\[0\].shape is \[1, 2, 3\]"),
    ({"inputs": [tensor(shape=[1, 3, 1, 2])]}, 400, r"inputs\[0\].shape is \[1, 3, 1, 2\]"),
    ({"inputs": [tensor(shape=[-1, 1, -2, 3])]}, 400, r"inputs\[0\].shape is"),
    ({"inputs": [tensor(shape=[True, 1, 2, 3])]}, 400, r"inputs\[0\].shape is"),
    ({"inputs": [tensor(shape=[1.0, 1, 2, 3])]}, 400, r"inputs\[0\].shape is"),
    ({"inputs": [tensor(shape=[0, 1, 2, 3], data=[])]}, 400, r"inputs\[0\].shape is"),
    ({"inputs": [tensor(shape=[65, 1, 2, 3])]}, 413, "65 images; at most 64 are allowed in a request"),
    ({"inputs": [tensor(shape=[1, 10**9, 10**9, 3])]}, 413, "1000000000 x 1000000000 pixels, more than the 25000000"),
    ({"inputs": [tensor(parameters=[])]}, 400, r"inputs\[0\].parameters must be a JSON object"),
    *(
        ({"inputs": [tensor(data=data)]}, 400, WHOLE)
        for data in (
            *([1, 2, 3, 4, 5], [1] * 7, [], "123456", {"a": 1}, 6, [1, 2, 3, 4, 5, 256], [-1, 2, 3, 4, 5, 6]),
            *([1.0] * 6, [True] * 6, [1, 2, 3, 4, 5, True], [1, 2, 3, 4, 5, 2**63], [1, 2, 3, 4, 5, 10**30]),
            *(["1"] * 6, [None] * 6, [[1, 2, 3], [4, 5, 6]], [[[[1, 2], [3, 4], [5, 6]]]], [[[[1, 2, 3], 4]]]),
            *([[[[1, 2, 3], [4, 5, [6]]]]], [[1, 2, 3, 4, 5, 6]]),
        )
    ),
    ({"inputs": [tensor(data=None)]}, 400, WHOLE),
    (b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 2, 3], "data": %s}]}' % DEEP, 400, WHOLE),
]


@pytest.mark.parametrize(("document", "status", "message"), MALFORMED, ids=lambda value: ascii(value)[:30])
def test_malformed_requests_say_where(document, status, message):
    with pytest.raises(RequestError, match=message) as refused:
        parse(document)
    assert refused.value.status == status
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "header",
    ["-1", "", " 5", "5.0", "1e3", "0x10", "²", "10000000", "9" * 5000, "0" * 5000],
    ids=lambda value: ascii(value)[:30],
)
def test_a_header_that_is_no_length_is_refused(header):
    body, _ = binary(np.zeros((1, 1, 2, 3), np.uint8))
    with pytest.raises(
        RequestError, match=r"Inference-Header-Content-Length is .*, not a length of at most the"
    ) as refused:
        oip.parse(body, header, KNOWN, Flags())
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("size", "tail", "data", "message"),
    [
        (6, 5, None, r"inputs\[0\] has 5 bytes for binary_data_size 6 and shape \[1, 1, 2, 3\]"),
        (5, 5, None, r"inputs\[0\] has 5 bytes for binary_data_size 5 and shape"),
        (6, 7, None, r"inputs\[0\] has 7 bytes for binary_data_size 6"),
        (-6, 6, None, r"binary_data_size -6"),
        (2**63, 6, None, r"binary_data_size 9223372036854775808"),
        ("6", 6, None, r"binary_data_size '6'"),
        ([6], 6, None, r"binary_data_size \[6\]"),
        (6, 6, [1, 2, 3, 4, 5, 6], r"inputs\[0\] has 6 bytes"),
        (None, 6, None, r"6 bytes follow the JSON, and inputs\[0\].parameters has no binary_data_size"),
    ],
)
def test_sizes_that_do_not_agree_are_refused(size, tail, data, message):
    head = json.dumps({"inputs": [tensor(data=data, parameters={"binary_data_size": size})]}).encode()
    with pytest.raises(RequestError, match=message) as refused:
        parse(head, str(len(head)), bytes(tail))
    assert refused.value.status == 400


def test_a_header_that_ends_inside_the_json_is_refused():
    body, header = binary(np.zeros((1, 1, 2, 3), np.uint8))
    with pytest.raises(RequestError, match="the body is no JSON"):
        oip.parse(body, str(int(header) - 1), KNOWN, Flags())
    with pytest.raises(RequestError, match="the body is no JSON"):
        oip.parse(body, None, KNOWN, Flags())


def test_very_long_strings_for_numbers_cost_nothing():
    """In an array of strings each would take as much memory as the longest one."""
    data = ["a"] * 1000 + ["b" * 10_000_000]
    with pytest.raises(RequestError, match="must be 6 whole numbers"):
        parse({"inputs": [tensor(data=data)]})
