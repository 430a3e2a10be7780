"""What the service takes on, and the ASGI layer that holds every request to it before anything else sees it."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from barlow.serving.metrics import Metrics
from barlow.settings.flags import Flags

logger = logging.getLogger("uvicorn.error")
Handler = Callable[[Request], Awaitable[Response]]


BODY_SECONDS = 30  # in which a request's body must have come
BODIES = 16  # of full size that are held at a time, all requests together
OPEN = ("/", "/docs", "/openapi.json", "/v2", "/v2/health/live", "/v2/health/ready")  # without a token


class Refusal(Exception):
    """A request that is not answered, with the HTTP status, a word for the metrics and a sentence for the client."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Guard:
    """ASGI middleware: token, number of requests, bytes and time of a body, and the figures of all that.

    POSTs to the paths of `direct` do not go through the application, which describes them: it would cost more than
    half of the service's own work on a request.
    """

    def __init__(
        self, app: ASGIApp, settings: Flags, metrics: Metrics, token: str | None, direct: Mapping[str, Handler]
    ) -> None:
        self._app, self._settings, self._metrics, self._direct = app, settings, metrics, direct
        self._token = token.encode() if token else None
        self._requests = self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or have the application answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        held, path = 0, scope["path"]
        handler = self._direct.get(path) if scope["method"] == "POST" else None
        self._requests += 1
        try:
            self._allow(scope)
            body = b""
            if scope["method"] in ("POST", "PUT", "PATCH"):
                body = await self._read(scope, receive)
                held = len(body)
            if handler is None:
                await self._app(scope, _replay(body, receive), noting)
            else:
                scope["app"] = self._app
                response = await handler(Request(scope, _replay(body, receive)))
                await response(scope, receive, noting)
        except Refusal as refusal:
            self._metrics.rejects.labels(refusal.reason).inc()
            await error(refusal.status, str(refusal))(scope, receive, noting)
        except Exception:
            logger.exception("%s %s", scope["method"], path)
            if not status:
                await error(500, "a bug in the service; its log says more")(scope, receive, noting)
        finally:
            self._requests -= 1
            self._bytes -= held
            if handler is None:  # a path that no route has is the client's to choose: it is not kept
                path = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(path, status, time.perf_counter() - started)

    def _allow(self, scope: Scope) -> None:
        path = scope["path"]
        if self._requests > self._settings.max_concurrent and not path.startswith("/v2/health/"):
            raise Refusal(
                429, "concurrency", f"more than {self._settings.max_concurrent} requests at a time; try again"
            )
        if self._token and path not in OPEN and not path.startswith("/static-offline-docs/"):
            given = _header(scope, b"authorization", b"")
            scheme, _, sent = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(sent, self._token):
                raise Refusal(401, "token", "the header `Authorization: Bearer TOKEN` is missing or wrong")
        if _header(scope, b"content-encoding", b"identity") != b"identity":
            raise Refusal(415, "content", "a compressed body; send it as it is")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Return the body, if it is short enough and comes in time; its bytes are then counted as held."""
        most = self._settings.max_body_bytes
        length = _header(scope, b"content-length", b"0")
        long = Refusal(413, "body", f"the request has more than the {most} bytes allowed")
        if not length.isdigit() or len(length) > 18 or int(length) > most:
            raise long
        parts, size = [], 0

        async def all_of_it() -> None:
            nonlocal size
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "disconnect", "the client went away")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                self._bytes += len(parts[-1])
                more = message.get("more_body", False)
                if size > most:
                    raise long
                if self._bytes > BODIES * most:
                    raise Refusal(429, "bytes", "too many bytes in requests at a time; try again")

        try:
            await asyncio.wait_for(all_of_it(), BODY_SECONDS)
        except BaseException as error:
            self._bytes -= size
            if isinstance(error, asyncio.TimeoutError):
                raise Refusal(408, "slow", f"the body did not come within {BODY_SECONDS} s") from None
            raise
        return b"".join(parts) if len(parts) > 1 else parts[0]


def _header(scope: Scope, name: bytes, default: bytes) -> bytes:
    """Return the first header of a name, which ASGI has in lower case."""
    return next((value for key, value in scope["headers"] if key == name), default)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body in one piece, and then what the server has to say."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return what every error looks like."""
    return JSONResponse({"error": message}, status, {**(headers or {}), **_HEADERS.get(status, {})})


_AGAIN, _CLOSE = {"Retry-After": "1"}, {"Connection": "close"}  # the latter where the rest of a body is not read
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: _CLOSE, 413: _CLOSE, 429: _AGAIN, 503: _AGAIN}
