"""uvicorn's HTTP/1.1 protocol, with limits that it lacks: bytes and seconds of the headers; its errors become JSON.

The class overrides methods that uvicorn does not document. pyproject.toml therefore bounds uvicorn's version, and
tests/serving/test_connection.py names each of those methods.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

HEADER_BYTES = 64 * 2**10  # the request line and all headers may have
HEADER_SECONDS = 10.0  # the headers must arrive within


class Protocol(HttpToolsProtocol):
    """One connection of a client."""

    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _unparsed = 0  # bytes since the last callback: the parser keeps an unfinished header of any length to itself

    def connection_made(self, transport: Any) -> None:
        """Start the timer of the headers."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the bytes, and refuse a header that does not end."""
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > HEADER_BYTES and not self.transport.is_closing():
            self._header_bytes = self._unparsed
            self.send_400_response("")

    def on_body(self, body: bytes) -> None:
        """Note that the parser got past the headers."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_begin(self) -> None:
        """Begin to count the bytes of a request's headers."""
        super().on_message_begin()
        self._header_bytes = 0
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        """Count the URL, which may arrive in parts."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header."""
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the timer: `limits.Guard` limits the time of the body."""
        self._stop_timer()
        self._unparsed = 0
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not HTTP (400) or whose headers are too long (431)."""
        if self._header_bytes > HEADER_BYTES:
            self._send_error(431, f"more than {HEADER_BYTES} bytes of headers")
        else:
            self._send_error(400, msg)

    def _count(self, *parts: bytes) -> None:
        self._header_bytes += sum(map(len, parts))
        if self._header_bytes > HEADER_BYTES:
            raise ValueError("too long")  # httptools turns it into a parser error, and uvicorn calls send_400_response

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._too_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        if not self.transport.is_closing():
            self._send_error(408, f"the headers did not come within {HEADER_SECONDS:g} s")

    def _send_error(self, status: int, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()
