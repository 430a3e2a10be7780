"""`barlow serve`: an exported encoder over HTTP, for programs (Open Inference Protocol v2), for people, and as a page.

Reads the ONNX file that --model names, and models/index. Another file there, or in a registry's production, replaces
it while requests go on. The token that clients must send is in the environment variable BARLOW_TOKEN, if at all.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from barlow import __version__
from barlow.core import files
from barlow.core.errors import UserError
from barlow.serving import images_api, inference_api
from barlow.serving.connection import Protocol
from barlow.serving.limits import Guard, Refusal, error
from barlow.serving.live import Live
from barlow.serving.metrics import Metrics
from barlow.serving.schemas import FAILURES
from barlow.settings.flags import Settings

DRAIN_SECONDS = 30  # for what was asked before SIGTERM
KEEP_ALIVE_SECONDS = 75  # longer than proxies keep an idle connection, so that none sends a request into its end
PAGE = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


def serve(
    model: Path | str = files.ONNX,
    host: str = "127.0.0.1",
    port: int = 8000,
    index: Path | str = files.INDEX,
    **settings: int,
) -> None:
    """Serve until a signal ends it, and then answer what was asked before.

    Raises:
        UserError: the model cannot be used, a setting is impossible, or the address cannot be listened on.
    """
    if not 0 < port < 2**16:
        raise UserError(f"--port {port} is not allowed; it must be from 1 to {2**16 - 1}")
    application = app(model, index, Settings(**settings), os.environ.get("BARLOW_TOKEN"))
    config = uvicorn.Config(
        application,
        http=Protocol,
        loop="uvloop",
        ws="none",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error}); choose another --host or --port") from None
    address = f"[{host}]" if ":" in host else host
    print(f"serving {model} at http://{address}:{port}; its interface is described at /docs", flush=True)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it notes each broken form
    sys.setswitchinterval(0.0005)  # seconds: the event loop and the workers wait for each other often and briefly
    gc.freeze()  # what is there stays; a collection that looks at all of it, or comes often, stops everything else
    gc.set_threshold(50_000, 20, 20)
    uvicorn.Server(config).run([listener])


def app(
    model: Path | str = files.ONNX,
    index: Path | str = files.INDEX,
    settings: Settings | None = None,
    token: str | None = None,
) -> Guard:
    """Load the model and return the application that answers with it; raises UserError as `serve` does."""
    settings = settings or Settings()
    settings.check()
    metrics = Metrics()
    live = Live(Path(model), Path(index), settings, metrics)
    html = Path(__file__).with_name("serving").joinpath("page.html").read_bytes()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(live.watch())
        yield
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await live.close()

    server = FastAPIOffline(title="Barlow", version=__version__, lifespan=lifespan, responses=FAILURES)
    server.state.live, server.state.settings, server.state.metrics = live, settings, metrics

    @server.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        metrics.rejects.labels(refusal.reason).inc()
        return error(refusal.status, str(refusal))

    @server.exception_handler(Exception)
    async def bug(_: Request, __: Exception) -> Response:
        return error(500, "a bug in the service; its log says more")

    @server.exception_handler(HTTPException)
    async def http_error(_: Request, failure: HTTPException) -> Response:
        return error(failure.status_code, str(failure.detail), failure.headers)

    @server.exception_handler(RequestValidationError)
    async def invalid(_: Request, failure: RequestValidationError) -> Response:
        return error(422, "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in failure.errors()))

    @server.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return Response(html, headers=PAGE, media_type="text/html")

    @server.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def measured() -> Response:
        """Return what Prometheus reads."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    server.include_router(images_api.router)
    server.include_router(inference_api.router)
    return Guard(server, settings, metrics, token, {**images_api.DIRECT, **inference_api.DIRECT})
