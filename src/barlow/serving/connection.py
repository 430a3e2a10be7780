"""uvicorn's HTTP/1.1 with what it leaves open: headers have a limit in bytes and in time, and errors are JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

HEADER_BYTES = 64 * 2**10  # of the request line and all headers
HEADER_SECONDS = 10.0  # in which they must have come


class Protocol(HttpToolsProtocol):
    """One connection."""

    _clock: asyncio.TimerHandle | None = None
    _size = 0
    _unseen = 0  # bytes that no callback has told of: the parser keeps a header's beginning, of any length, to itself

    def connection_made(self, transport: Any) -> None:
        """Start the clock."""
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop it."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count, and parse."""
        self._unseen += len(data)
        super().data_received(data)
        if self._unseen > HEADER_BYTES and not self.transport.is_closing():
            self._size = self._unseen
            self.send_400_response("")

    def on_body(self, body: bytes) -> None:
        """Note that the parser goes on."""
        self._unseen = 0
        super().on_body(body)

    def on_message_begin(self) -> None:
        """Begin to count."""
        super().on_message_begin()
        self._size = 0
        self._start()

    def on_url(self, url: bytes) -> None:
        """Count."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count."""
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the clock: from here on the application has its own limits."""
        self._stop()
        self._unseen = 0
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or too much of it."""
        status = 431 if self._size > HEADER_BYTES else 400
        self._error(status, f"more than {HEADER_BYTES} bytes of headers" if status == 431 else msg)

    def _count(self, *parts: bytes) -> None:
        self._size += sum(map(len, parts))
        if self._size > HEADER_BYTES:
            raise ValueError("too long")  # the parser ends with an error, and send_400_response is called

    def _start(self) -> None:
        self._stop()
        self._clock = self.loop.call_later(HEADER_SECONDS, self._late)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _late(self) -> None:
        if not self.transport.is_closing():
            self._error(408, f"the headers did not come within {HEADER_SECONDS:g} s")

    def _error(self, status: int, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()
