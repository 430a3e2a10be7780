"""The application: routes, what its errors look like, and the model it answers with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from barlow import __version__
from barlow.core import files
from barlow.serving import images_api, inference_api
from barlow.serving.limits import Guard, Refusal, error
from barlow.serving.live import Live
from barlow.serving.metrics import Metrics
from barlow.serving.schemas import FAILURES
from barlow.settings.flags import Flags

PAGE = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


def app(
    model: Path | str = files.ONNX,
    index: Path | str = files.INDEX,
    settings: Flags | None = None,
    token: str | None = None,
) -> Guard:
    """Load the model and return the application that answers with it; raises UserError as `serve` does."""
    settings = settings or Flags()
    settings.check()
    metrics = Metrics()
    live = Live(Path(model), Path(index), settings, metrics)
    html = Path(__file__).with_name("page.html").read_bytes()

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
