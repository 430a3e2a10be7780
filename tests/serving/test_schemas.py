"""The document at /openapi.json; test_hostile.py checks the answers against it."""

import asyncio
import json
import re

import httpx
import pytest
from jsonschema import Draft202012Validator

from barlow.serving import images_api, inference_api, schemas
from barlow.serving.app import app


@pytest.fixture
def described(tmp_path, mean_onnx):
    application = app(mean_onnx(tmp_path / "encoder.onnx"), tmp_path)

    async def get():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://test") as client:
            return (await client.get("/openapi.json")).json()

    return asyncio.run(get())


def test_every_route_of_the_apis_is_described(described):
    """Except the longer spellings of a path that is described."""
    routes = {route.path: route for route in images_api.ROUTES + inference_api.ROUTES}
    spellings = {path for path in routes if "/versions/" in path} | {"/v2/models/encoder/infer"}
    assert routes.keys() - spellings | {"/metrics"} == described["paths"].keys()
    for path, route in routes.items():
        for method, operation in described["paths"].get(path, {}).items():
            assert method.upper() in route.methods
            in_path = {parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "path"}
            assert in_path == {*route.param_convertors}


def test_operations_have_names_of_their_own(described):
    """The names are part of the interface: client generators call their functions by them."""
    names = [op["operationId"] for operations in described["paths"].values() for op in operations.values()]
    assert len(names) == len(set(names)) == 15
    assert {"embed_v1_embed_post", "infer_v2_models__name__infer_post", "sample_v1_index_samples__number__get"} < {
        *names
    }


def test_every_reference_has_its_schema(described):
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)))
    assert references == described["components"]["schemas"].keys() - {"Answer", "Result"}
    assert {"Failure", "Embeddings", "Embedding", "Probability", "Neighbour"} < references


def test_every_operation_describes_its_errors(described):
    for path, operations in described["paths"].items():
        for operation in operations.values():
            for status in schemas.REASONS:
                content = operation["responses"][str(status)]["content"]["application/json"]
                assert content["schema"] == {"$ref": "#/components/schemas/Failure"}, (path, status)


@pytest.mark.parametrize(("path", "name", "most"), [("classify", "top", 1000), ("search", "k", 100)])
def test_images_come_in_forms_or_json(described, path, name, most):
    operation = described["paths"][f"/v1/{path}"]["post"]
    assert [*operation["requestBody"]["content"]] == ["multipart/form-data", "application/json"]
    (parameter,) = operation["parameters"]
    assert (parameter["name"], parameter["schema"]["maximum"]) == (name, most)


SIXTEEN = {"shape": [1, 1, 1, 2], "datatype": "UINT16", "data": [1, 65535]}
FAULTS = ({"shape": [1, 1, 1, 0]}, {"shape": [1, 1, 3]}, {"datatype": "FP32"})


@pytest.mark.parametrize("changed", [{}, SIXTEEN, *FAULTS])
def test_a_tensor_is_described_as_the_protocol_reads_it(described, changed):
    body = described["paths"]["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]["application/json"]
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]} | changed
    assert Draft202012Validator(body["schema"]).is_valid({"inputs": [tensor]}) == (changed not in FAULTS)
