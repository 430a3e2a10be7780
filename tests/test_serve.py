import asyncio
import io
import socket
import subprocess
import sys

import httpx
import numpy as np
import pytest
from PIL import Image

from barlow import serve
from barlow.errors import UserError


def png(*colour, size=(4, 3)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def post(client, *contents):
    return client.post("/v1/embed", files=[("files", (f"{i}.png", data)) for i, data in enumerate(contents)])


class Client:
    """Calls the application in this process."""

    def __init__(self, app):
        self.transport = httpx.ASGITransport(app)

    def request(self, method, path, **options):
        async def request():
            async with httpx.AsyncClient(transport=self.transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(request())

    def get(self, path):
        return self.request("GET", path)

    def post(self, path, **options):
        return self.request("POST", path, **options)


@pytest.fixture
def client(tmp_path, mean_onnx):
    return Client(serve.app(mean_onnx(tmp_path / "encoder.onnx")))


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
def test_health(client, path):
    assert client.get(path).status_code == 200


def test_metadata(client, tmp_path, mean_onnx):
    answer = client.get("/v2/models/encoder").json()
    assert answer["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    assert answer["outputs"] == [{"name": "embedding", "datatype": "FP32", "shape": [-1, 3]}]
    assert answer["parameters"]["space"] == "mean"
    headed = Client(serve.app(mean_onnx(tmp_path / "head.onnx", ["a", "b", "c"])))
    outputs = headed.get("/v2/models/encoder").json()["outputs"]
    assert outputs[1] == {"name": "logits", "datatype": "FP32", "shape": [-1, 3]}


def test_embed_several_sizes(client):
    answer = post(client, png(10, 20, 30), png(1, 2, 3, size=(9, 9)), png(0, 0, 255))
    assert answer.status_code == 200
    wanted = [[10, 20, 30], [1, 2, 3], [0, 0, 255]]
    assert answer.json() == {"space": "mean", "dim": 3, "embeddings": wanted}


def test_embed_names_the_class(tmp_path, mean_onnx):
    client = Client(serve.app(mean_onnx(tmp_path / "encoder.onnx", ["red", "green", "blue"])))
    answer = post(client, png(0, 1, 0), png(200, 0, 0)).json()
    assert answer["classes"] == ["green", "red"]
    assert answer["probabilities"] == pytest.approx([np.exp(2) / (2 + np.exp(2)), 1])


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"", 415, "not an image"),
        (b"text", 415, "not an image"),
        (png(1, 2, 3)[:45], 415, ""),
        (png(1, 2, 3, size=(300, 300)), 413, "300 x 300 pixels, more than the 80000 allowed"),
    ],
    ids=["empty", "text", "truncated", "pixels"],
)
def test_one_bad_image_fails_the_request_by_name(client, monkeypatch, data, status, reason):
    monkeypatch.setattr(serve, "MAX_PIXELS", 80_000)
    answer = post(client, png(1, 2, 3), data)
    assert answer.status_code == status
    assert [*answer.json()] == ["error"]
    assert answer.json()["error"].startswith("1.png: ")
    assert reason in answer.json()["error"]


def test_requests_are_limited_in_bytes_and_files(client, monkeypatch):
    monkeypatch.setattr(serve, "MAX_BYTES", 1000)
    answer = post(client, bytes(2000))
    assert answer.status_code == 413
    assert "at most 1000 are allowed" in answer.json()["error"]
    monkeypatch.setattr(serve, "MAX_FILES", 1)
    answer = post(client, png(1, 2, 3), png(1, 2, 3))
    assert (answer.status_code, answer.json()) == (413, {"error": "2 files; at most 1 are allowed in a request"})


def test_a_body_of_unknown_length_is_refused(client):
    async def body():
        yield b"x"

    answer = client.post("/v1/embed", content=body(), headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 411
    assert [*answer.json()] == ["error"]


@pytest.mark.parametrize(
    "form", [{"files": {"other": b"x"}}, {"data": {"files": "x"}}, {"json": {}}, {"content": b"x"}]
)
def test_other_forms_are_refused(client, form):
    answer = client.post("/v1/embed", **form)
    assert answer.status_code == 400
    assert "files" in answer.json()["error"]


def test_unknown_path(client):
    answer = client.get("/v2/models/other")
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


def test_no_model(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        serve.app(tmp_path / "encoder.onnx")


def test_address_in_use(tmp_path, mean_onnx):
    path = mean_onnx(tmp_path / "encoder.onnx")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port} .*choose another"):
            serve.serve(path, port=port)
    with pytest.raises(UserError, match="--port 70000 is not allowed"):
        serve.serve(path, port=70_000)


def test_serving_imports_nothing_heavy():
    heavy = "torch", "nvidia", "dvc", "prefect", "pandas", "pyarrow", "great_expectations", "yaml"
    script = f"import sys; from barlow import cli, serve; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
