"""`barlow serve`: an exported encoder over HTTP.

Reads models/encoder.onnx. Health and metadata have the paths of the Open Inference Protocol (v2), and so have errors
their form, {"error": "..."}.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import uvicorn
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, File, HTTPException, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.base import RequestResponseEndpoint

from barlow.encoder import Encoder, Pixels, top1
from barlow.errors import UserError
from barlow.files import ONNX, cpus
from barlow.images import TooManyPixelsError, decode

MAX_BYTES = 32 * 2**20  # of a request
MAX_FILES = 64  # in a request
MAX_PIXELS = 25_000_000  # of an image; inside the network it takes about 25 bytes a pixel


def serve(model: Path | str = ONNX, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until a signal ends it.

    Raises:
        UserError: the model cannot be used, or the address cannot be listened on.
    """
    if not 0 < port < 2**16:
        raise UserError(f"--port {port} is not allowed; it must be from 1 to {2**16 - 1}")
    server = uvicorn.Server(uvicorn.Config(app(model)))
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error}); choose another --host or --port") from None
    print(f"serving {model} at http://{host}:{port}; its interface is described at /docs", flush=True)
    server.run([listener])


def app(model: Path | str = ONNX) -> FastAPI:
    """Load a model and return the application that answers with it; raises UserError as `Encoder` does."""
    encoder = Encoder(model)
    encoder.embed([np.zeros((32, 32, 3), np.uint8)])  # the first run allocates: no request shall wait for it
    workers = CapacityLimiter(cpus())  # requests that are decoded and embedded at a time; it bounds memory
    server = FastAPI(title="Barlow", version=encoder.metadata["version"])

    @server.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, error: StarletteHTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @server.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _error(400, "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))

    @server.middleware("http")
    async def check_length(request: Request, answer: RequestResponseEndpoint) -> Response:
        """Refuse a long body by its header, before any of it is read; the HTTP server holds it to what it announced."""
        length = request.headers.get("content-length")
        if request.method == "POST" and length is None:
            return _error(411, "the request has no Content-Length")
        if int(length or 0) > MAX_BYTES:
            return _error(413, f"the request has {length} bytes; at most {MAX_BYTES} are allowed")
        return await answer(request)

    @server.get("/v2/health/live")
    def live() -> dict[str, bool]:
        return {"live": True}

    @server.get("/v2/health/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}  # the model is loaded before the first connection is accepted

    @server.get("/v2/models/encoder")
    def metadata() -> dict[str, Any]:
        logits = [{"name": "logits", "datatype": "FP32", "shape": [-1, len(encoder.classes or [])]}]
        return {
            "name": "encoder",
            "versions": [encoder.metadata["version"]],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
            "outputs": [
                {"name": "embedding", "datatype": "FP32", "shape": [-1, encoder.dim]},
                *(logits if encoder.classes else []),
            ],
            "parameters": encoder.metadata,
        }

    @server.post("/v1/embed")
    async def embed(files: Annotated[list[UploadFile], File()]) -> Response:
        """Embed image files of any format and size, in one multipart form, each under the name `files`."""
        if len(files) > MAX_FILES:
            raise HTTPException(413, f"{len(files)} files; at most {MAX_FILES} are allowed in a request")
        contents = [(file.filename or "file", await file.read()) for file in files]
        return JSONResponse(await to_thread.run_sync(_answer, encoder, contents, limiter=workers))

    return server


def _answer(encoder: Encoder, contents: list[tuple[str, bytes]]) -> dict[str, Any]:
    """Decode and embed, one batch in memory at a time."""
    answer: dict[str, Any] = {"space": encoder.metadata["space"], "dim": encoder.dim, "embeddings": []}
    if encoder.classes:
        answer |= {"classes": [], "probabilities": []}
    for embeddings, logits in encoder.run(_decoded(contents)):
        answer["embeddings"] += embeddings.tolist()
        if logits is not None and encoder.classes:
            names, probabilities = top1(logits, encoder.classes)
            answer["classes"] += names
            answer["probabilities"] += probabilities.tolist()
    return answer


def _decoded(contents: list[tuple[str, bytes]]) -> Iterator[Pixels]:
    for name, data in contents:
        try:
            yield decode(data, MAX_PIXELS)
        except TooManyPixelsError as error:
            raise HTTPException(413, f"{name}: {error}") from None
        except ValueError as error:
            raise HTTPException(415, f"{name}: {error}") from None


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)
