"""The description at /openapi.json; that answers keep to it is shown in test_hostile.py."""

import asyncio

import httpx
import pytest
from jsonschema import Draft202012Validator

from barlow.serving import schemas
from barlow.serving.app import app


@pytest.fixture
def described(tmp_path, mean_onnx):
    application = app(mean_onnx(tmp_path / "encoder.onnx"), tmp_path)

    async def get():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://test") as client:
            return (await client.get("/openapi.json")).json()

    return asyncio.run(get())


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


@pytest.mark.parametrize("changed", [{}, {"shape": [1, 1, 1, 4]}, {"shape": [1, 1, 3]}, {"datatype": "FP32"}])
def test_a_tensor_is_described_as_the_protocol_reads_it(described, changed):
    body = described["paths"]["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]["application/json"]
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]} | changed
    assert Draft202012Validator(body["schema"]).is_valid({"inputs": [tensor]}) == (not changed)
