"""The protocol's public client against a running service."""

import httpx
import numpy as np
import pytest
from services import start
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from barlow import __version__
from barlow.encoder.encoder import Encoder

CLASSES = ["a", "b", "c", "d"]
SHAPES = [(1, 28, 28, 3), (5, 28, 28, 3), (32, 40, 33, 3), (64, 9, 9, 3), (1, 300, 500, 3)]


@pytest.fixture(scope="module")
def service(indexed):
    with start(indexed / "models/encoder.onnx") as service:
        yield service


@pytest.fixture
def client(service):
    client = triton.InferenceServerClient(f"127.0.0.1:{service.port}", concurrency=8, network_timeout=30)
    yield client
    client.close()


@pytest.fixture(scope="module")
def encoder(indexed):
    return Encoder(indexed / "models/encoder.onnx")


def pictures(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tensor(images, binary=True, name="images", datatype="UINT8"):
    given = triton.InferInput(name, [*images.shape], datatype)
    given.set_data_from_numpy(images, binary_data=binary)
    return [given]


def test_the_service_and_the_model_are_alive_and_ready(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("encoder")
    assert client.is_model_ready("encoder", "encoder.onnx")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("encoder", "2")


def test_the_service_and_the_model_describe_themselves(client, encoder):
    description = client.get_server_metadata()
    assert description == {"name": "barlow", "version": __version__, "extensions": ["binary_tensor_data"]}
    description = client.get_model_metadata("encoder")
    assert description == client.get_model_metadata("encoder", "encoder.onnx")
    assert (description["name"], description["versions"]) == ("encoder", ["encoder.onnx"])
    assert description["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    assert description["outputs"] == [
        {"name": "embedding", "datatype": "FP32", "shape": [-1, 12]},
        {"name": "logits", "datatype": "FP32", "shape": [-1, 4]},
    ]
    assert description["parameters"] == encoder.metadata


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sent", ["binary", "json"])
@pytest.mark.parametrize("returned", ["binary", "json", "default"])
def test_answers_are_those_of_the_encoder(client, encoder, shape, sent, returned):
    images = pictures(shape)
    outputs = [triton.InferRequestedOutput(name, binary_data=returned == "binary") for name in ("embedding", "logits")]
    asked = None if returned == "default" else outputs
    answer = client.infer("encoder", tensor(images, sent == "binary"), outputs=asked, request_id="é 7")
    description = answer.get_response()
    assert (description["model_name"], description["model_version"], description["id"]) == (
        "encoder",
        "encoder.onnx",
        "é 7",
    )
    for name, wanted in (("embedding", encoder.embed(images)), ("logits", encoder.classify(images))):
        assert answer.get_output(name)["datatype"] == "FP32"
        values = answer.as_numpy(name)
        assert (values.dtype, values.shape) == (np.float32, wanted.shape)
        np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-5)


def test_only_the_outputs_asked_for_come_back(client, encoder):
    images = pictures((3, 28, 28, 3))
    answer = client.infer(
        "encoder", tensor(images), model_version="encoder.onnx", outputs=[triton.InferRequestedOutput("logits")]
    )
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["logits"]
    assert answer.as_numpy("embedding") is None
    np.testing.assert_allclose(answer.as_numpy("logits"), encoder.classify(images), rtol=1e-4, atol=1e-5)
    assert "id" not in answer.get_response()


def test_many_requests_at_a_time_each_get_their_own_answer(client, encoder):
    batches = [pictures((1 + i % 5, 20 + i % 3, 28, 3), seed=i) for i in range(60)]
    pending = [client.async_infer("encoder", tensor(images), request_id=str(i)) for i, images in enumerate(batches)]
    for i, (images, waiting) in enumerate(zip(batches, pending, strict=True)):
        answer = waiting.get_result()
        assert answer.get_response()["id"] == str(i)
        np.testing.assert_allclose(answer.as_numpy("embedding"), encoder.embed(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"model_name": "other"}, "model 'other' is not here; there is 'encoder' version 'encoder.onnx'"),
        ({"model_version": "2"}, "model 'encoder version 2' is not here; there is"),
        ({"inputs": tensor(pictures((1, 4, 4, 3)), name="pixels")}, "inputs[0] is 'pixels', 'UINT8'; it must be"),
        (
            {"inputs": tensor(np.zeros((1, 4, 4, 3), np.float32), datatype="FP32")},
            "inputs[0] is 'images', 'FP32'; it must be 'images', 'UINT8'",
        ),
        (
            {"inputs": tensor(pictures((1, 3, 4, 4)))},
            "inputs[0].shape is [1, 3, 4, 4]; it must be [batch, height, width, 3]",
        ),
        ({"inputs": tensor(pictures((4, 4, 3)))}, "inputs[0].shape is [4, 4, 3]; it must be"),
        ({"inputs": 2 * tensor(pictures((1, 4, 4, 3)))}, "inputs must be a list of one tensor, 'images'"),
        ({"inputs": tensor(pictures((65, 4, 4, 3)))}, "65 images; at most 64 are allowed in a request"),
        (
            {"outputs": [triton.InferRequestedOutput("features")]},
            "outputs[0].name is 'features'; there are: embedding, logits",
        ),
    ],
)
@pytest.mark.parametrize("sent", ["infer", "async_infer"])
def test_mistakes_raise_the_clients_exception_with_our_message(client, sent, request_, message):
    whole = {"model_name": "encoder", "inputs": tensor(pictures((1, 4, 4, 3)))} | request_
    with pytest.raises(InferenceServerException) as raised:
        client.infer(**whole) if sent == "infer" else client.async_infer(**whole).get_result()
    assert raised.value.message().startswith(message)
    assert raised.value.status() in ("400", "404", "413")


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_are_refused_clearly(client, algorithm):
    with pytest.raises(InferenceServerException, match="a compressed body; send it as it is") as raised:
        client.infer("encoder", tensor(pictures((1, 4, 4, 3))), request_compression_algorithm=algorithm)
    assert raised.value.status() == "415"


def test_a_client_that_accepts_compressed_answers_gets_plain_ones(client, encoder):
    images = pictures((2, 28, 28, 3))
    answer = client.infer("encoder", tensor(images), response_compression_algorithm="gzip")
    np.testing.assert_allclose(answer.as_numpy("embedding"), encoder.embed(images), rtol=1e-4, atol=1e-5)


def test_what_is_not_offered_is_not_found(client):
    for ask in (client.get_model_repository_index, lambda: client.get_model_config("encoder")):
        with pytest.raises(InferenceServerException, match="Not Found"):
            ask()


def test_json_without_a_client_library(service, encoder):
    """The body that the protocol's own examples send with curl, and the client library's version in the path."""
    images = pictures((2, 6, 5, 3))
    given = {"name": "images", "datatype": "UINT8", "shape": [*images.shape], "data": images.tolist()}
    for path in ("encoder", "encoder/versions/encoder.onnx"):
        answer = httpx.post(f"{service.url}/v2/models/{path}/infer", json={"inputs": [given]}, trust_env=False)
        assert answer.headers["content-type"] == "application/json"
        output = answer.json()["outputs"][0]
        values = np.array(output["data"], np.float32).reshape(output["shape"])
        np.testing.assert_allclose(values, encoder.embed(images), rtol=1e-4, atol=1e-5)
