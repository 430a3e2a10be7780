"""The limits of a request, and the ASGI application that checks them before the router sees the request."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Mapping

from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from barlow.serving.metrics import Metrics
from barlow.settings.flags import Flags

logger = logging.getLogger("uvicorn.error")

BODY_SECONDS = 30.0  # a request's body must arrive within this time
BODIES = 16  # the bodies of all requests together may hold this many times --max-body-bytes
ASSETS = "/static-offline-docs"  # scripts and styles of /docs
OPEN = ("/", "/docs", "/redoc", "/openapi.json", "/v2", "/v2/health/live", "/v2/health/ready")  # these need no token


class RequestError(Exception):
    """A request that is refused: the HTTP status, a word for the metrics and a sentence for the client."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Guard:
    """The ASGI application around a router: checks limits and token, turns exceptions into JSON, counts every answer.

    It replaces the class Starlette, whose three layers cost 3 % of the requests per second (benchmarks/RESULTS.md).
    """

    def __init__(self, router: Router, flags: Flags, metrics: Metrics, token: str | None) -> None:
        self.state = State()  # for the endpoints, which read `request.app.state`
        self._router, self._flags, self._metrics = router, flags, metrics
        self._token = token.encode() if token else None
        self._requests = self._bytes = 0
        routes = [route for route in router.routes if isinstance(route, Route) and "POST" in (route.methods or ())]
        self._posts = {route.path for route in routes if not route.param_convertors}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or end with an error in JSON."""
        scope["app"] = self
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        started, status, held = time.perf_counter(), 0, 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._requests += 1
        try:
            self._allow(scope)
            body = b""
            if scope["method"] in ("POST", "PUT", "PATCH"):
                body = await self._read(scope, receive)
                held = len(body)
            await self._router(scope, _replay(body, receive), noting)
        except RequestError as error:
            self._metrics.rejects.labels(error.reason).inc()
            await error_response(error.status, str(error))(scope, receive, noting)
        except HTTPException as error:  # of the router: 404 and 405
            await error_response(error.status_code, error.detail, error.headers)(scope, receive, noting)
        except Exception:
            logger.exception("%s %s", scope["method"], scope["path"])
            if not status:
                await error_response(500, "a bug in the service; its log says more")(scope, receive, noting)
        finally:
            self._requests -= 1
            self._bytes -= held
            # a label is kept for ever, so the paths that only a client made up share one
            path = scope["path"] if scope["path"] in self._posts else "other"
            if (route := scope.get("route")) is not None:
                path = route.path
            self._metrics.answered(path, status, time.perf_counter() - started)

    def _allow(self, scope: Scope) -> None:
        path, most = scope["path"], self._flags.max_concurrent
        if self._requests > most and not path.startswith("/v2/health/"):
            raise RequestError(429, "concurrency", f"more than {most} requests at a time; try again")
        if self._token and path not in OPEN and not path.startswith(f"{ASSETS}/"):
            scheme, _, token = _header(scope, b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token, self._token):
                raise RequestError(401, "token", "the header `Authorization: Bearer TOKEN` is missing or wrong")
        if _header(scope, b"content-encoding", b"identity").lower() not in (b"", b"identity"):
            raise RequestError(415, "content", "a compressed body; send it as it is")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Return the body. While it is read and afterwards, its bytes count towards those of all requests.

        Raises:
            RequestError: the body is too long (413) or too slow (408), all bodies together are (429), or the client
                went away (400).
        """
        most = self._flags.max_body_bytes
        too_long = RequestError(413, "body", f"the request has more than the {most} bytes allowed")
        length = _header(scope, b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > most:
            raise too_long
        parts, size = list[bytes](), 0

        async def read() -> None:
            nonlocal size
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RequestError(400, "disconnect", "the client went away")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                self._bytes += len(parts[-1])
                more = message.get("more_body", False)
                if size > most:
                    raise too_long
                if self._bytes > BODIES * most:
                    raise RequestError(429, "bytes", "too many bytes in requests at a time; try again")

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except BaseException as error:
            self._bytes -= size
            if isinstance(error, asyncio.TimeoutError):
                raise RequestError(408, "slow", f"the body did not come within {BODY_SECONDS:g} s") from None
            raise
        return b"".join(parts) if len(parts) > 1 else parts[0]


def _header(scope: Scope, name: bytes, default: bytes) -> bytes:
    """Return the first header of a name, which ASGI has in lower case."""
    return next((value for key, value in scope["headers"] if key == name), default)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body in one piece, and afterwards the server's messages."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return the JSON that every error has, with the headers of its status."""
    return JSONResponse({"error": message}, status, {**(headers or {}), **_HEADERS.get(status, {})})


_AGAIN, _CLOSE = {"Retry-After": "1"}, {"Connection": "close"}  # the latter where the rest of a body is not read
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: _CLOSE, 413: _CLOSE, 429: _AGAIN, 503: _AGAIN}
