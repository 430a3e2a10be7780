"""The ASGI application: one table of routes, the shape of its errors, and the model that answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles

from barlow import __version__
from barlow.core import files
from barlow.serving import images_api, inference_api, schemas
from barlow.serving.limits import ASSETS, Guard
from barlow.serving.live import Live
from barlow.serving.metrics import Metrics
from barlow.settings.flags import Flags

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
DOCUMENT = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Barlow</title>
<link rel="icon" href="{ASSETS}/favicon.png">
<link rel="stylesheet" href="{ASSETS}/swagger-ui.css">
</head>
<body>%s</body>
</html>
"""
DOCS = f"""<div id="swagger-ui"></div>
<script src="{ASSETS}/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({{url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, showExtensions: true,
showCommonExtensions: true}})</script>"""
REDOC = f'<redoc spec-url="/openapi.json"></redoc><script src="{ASSETS}/redoc.standalone.js"></script>'


def app(
    model: Path | str = files.ONNX,
    index: Path | str = files.INDEX,
    flags: Flags | None = None,
    token: str | None = None,
) -> Guard:
    """Load the model and return the application; raises UserError as `serve.run` does."""
    flags = flags or Flags()
    flags.check()
    metrics = Metrics()
    live = Live(Path(model), Path(index), flags, metrics)
    html = Path(__file__).with_name("page.html").read_bytes()

    @asynccontextmanager
    async def lifespan(_: Guard) -> AsyncIterator[None]:
        watching = asyncio.create_task(live.watch())
        yield
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await live.close()

    async def page(_: Request) -> Response:
        return Response(html, headers=PAGE_HEADERS, media_type="text/html")

    async def measured(_: Request) -> Response:
        """Return what Prometheus reads."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def docs(_: Request) -> Response:
        return HTMLResponse(DOCUMENT % DOCS)

    async def redoc(_: Request) -> Response:
        return HTMLResponse(DOCUMENT % REDOC)

    async def openapi(_: Request) -> Response:
        return JSONResponse(description)

    routes = [  # the router tries them in this order, so the busy paths come first
        *images_api.ROUTES,
        *inference_api.ROUTES,
        Route("/metrics", measured),
        Route("/", page),
        Route("/docs", docs),
        Route("/redoc", redoc),
        Route("/openapi.json", openapi),
    ]
    description = schemas.openapi("Barlow", __version__, routes)
    # fastapi-offline is there for its copies of Swagger UI and ReDoc; StaticFiles finds them without importing it
    assets = Mount(ASSETS, StaticFiles(packages=[("fastapi_offline", "static")]))

    router = Router([*routes, assets], redirect_slashes=False, lifespan=lifespan)
    guard = Guard(router, flags, metrics, token)
    guard.state.live, guard.state.flags, guard.state.metrics = live, flags, metrics
    return guard
