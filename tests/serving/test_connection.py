import asyncio
import inspect
import json
import threading
from contextlib import suppress

import pytest
import uvicorn
from services import Wire, hosting, until
from uvicorn.protocols.http import httptools_impl

from barlow.serving import connection

GET = "GET {} HTTP/1.1\r\nhost: a\r\n\r\n"


class Echo:
    """An application that answers with method, path and length of the body; /held waits for the event `held`."""

    def __init__(self):
        self.held, self.inside = threading.Event(), 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message["more_body"]
        if scope["path"] == "/held":
            self.inside += 1
            await asyncio.to_thread(self.held.wait, 20)
        body = f"{scope['method']} {scope['path']} {size}".encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def echo():
    return Echo()


@pytest.fixture(scope="module")
def port(echo):
    with hosting(echo) as port:
        yield port


@pytest.fixture
def wire(port):
    with Wire(port) as wire:
        yield wire


@pytest.fixture
def short(monkeypatch):
    """A tenth of a second for the headers."""
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.1)


def push(wire, *parts):
    """Send pieces, as they would come over a network; the server may answer and close before all of them are sent."""
    with suppress(OSError):
        for part in parts:
            wire.send(part)


def is_error(wire, status, why):
    """The next answer is an error in JSON, and then the server closes."""
    answered, headers, body = wire.answer()
    assert answered == status
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert [*json.loads(body)] == ["error"]
    assert why in json.loads(body)["error"]
    assert wire.answer() is None


INTERNALS = {  # methods of uvicorn's protocol class that ours overrides, with their parameters
    "connection_made": ["transport"],
    "connection_lost": ["exc"],
    "data_received": ["data"],
    "on_message_begin": [],
    "on_url": ["url"],
    "on_header": ["name", "value"],
    "on_headers_complete": [],
    "on_body": ["body"],
    "send_400_response": ["msg"],
}


@pytest.mark.parametrize("name", INTERNALS)
def test_uvicorn_has_the_method_that_is_overridden(name):
    version = f"uvicorn {uvicorn.__version__}"
    method = getattr(httptools_impl.HttpToolsProtocol, name, None)
    assert method is not None, f"{version} has no HttpToolsProtocol.{name}: adapt serving/connection.py"
    parameters = [*inspect.signature(method).parameters][1:]
    assert parameters == INTERNALS[name], f"{version} changed HttpToolsProtocol.{name}: adapt serving/connection.py"


def test_uvicorn_has_what_else_is_used():
    version = f"uvicorn {uvicorn.__version__}"
    lines = getattr(httptools_impl, "STATUS_LINE", {})
    for status in (400, 408, 431):
        assert lines.get(status, b"").startswith(b"HTTP/1.1 %d " % status), f"{version} has no STATUS_LINE[{status}]"
    source = inspect.getsource(httptools_impl.HttpToolsProtocol)
    for attribute in ("self.loop =", "self.transport =", "self.send_400_response(msg)"):
        assert attribute in source, f"{version} has no `{attribute}` in HttpToolsProtocol: adapt serving/connection.py"


def test_every_overridden_method_is_checked():
    theirs, ours = vars(httptools_impl.HttpToolsProtocol), vars(connection.Protocol)
    assert {name for name in ours if name in theirs and not name.startswith("__")} == {*INTERNALS}


@pytest.mark.parametrize(
    "head",
    [
        [f"x-{i}: {'v' * 100}\r\n" for i in range(700)],
        [f"x: {'v' * 66_000}\r\n"],
        [f"x: {'v' * 10_000}", *["v" * 10_000] * 60],
        [f"{'x' * 66_000}: v\r\n"],
        ["x" * 10_000] * 60,
    ],
    ids=["many", "long", "long and never ending", "long name", "never ending name"],
)
def test_huge_headers_are_refused(wire, head):
    push(wire, "GET / HTTP/1.1\r\nhost: a\r\n", *head, "\r\n\r\n")
    is_error(wire, 431, "more than 65536 bytes of headers")


def test_a_huge_path_is_refused(wire):
    push(wire, GET.format("/" + "a" * 70_000))
    is_error(wire, 431, "more than 65536 bytes of headers")


def test_huge_trailers_are_refused(wire):
    head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: "
    push(wire, head, *["v" * 10_000] * 60)
    is_error(wire, 431, "more than 65536 bytes of headers")


def test_headers_up_to_the_limit_are_fine(wire):
    for _ in range(2):
        wire.send("GET /a HTTP/1.1\r\nhost: a\r\nx: ", "v" * 30_000, "\r\ny: ")
        wire.send("v" * 35_000, "\r\n\r\n")
        assert wire.answer()[::2] == (200, b"GET /a 0")


@pytest.mark.parametrize("pieces", [1, 40])
def test_large_bodies_are_no_headers(wire, pieces):
    head = "POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 4000000\r\n\r\n"
    for _ in range(2):
        wire.send(head)
        for _ in range(pieces):
            wire.send(bytes(4_000_000 // pieces))
        assert wire.answer()[::2] == (200, b"POST /a 4000000")
    chunk = bytes(100_000)
    wire.send("POST /b HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(40):
        wire.send(f"{len(chunk):x}\r\n", chunk, "\r\n")
    wire.send("0\r\n\r\n", GET.format("/c"))
    assert wire.answer()[::2] == (200, b"POST /b 4000000")
    assert wire.answer()[::2] == (200, b"GET /c 0")


@pytest.mark.parametrize("begun", ["", "GET", "GET / HTTP/1.1\r\nhost: a\r\n", "GET / HTTP/1.1\r\nhost: a\r\nx: y"])
def test_slow_headers_are_given_up(short, wire, begun):
    wire.send(begun)
    is_error(wire, 408, "the headers did not come within 0.1 s")


def test_slow_headers_are_given_up_however_often_a_little_comes(short, wire):
    wire.send("GET / HTTP/1.1\r\n")
    wire.socket.settimeout(0.01)
    for i in range(1000):
        push(wire, f"x-{i}: y\r\n")
        with suppress(TimeoutError):
            assert wire.answer()[0] == 408
            return
    raise AssertionError("it was never answered")


def test_slow_headers_of_a_later_request_are_given_up_too(monkeypatch, wire):
    wire.send(GET.format("/a"))
    assert wire.answer()[0] == 200
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.1)
    wire.send("GET /b HTTP/1.1\r\n")
    is_error(wire, 408, "the headers did not come within 0.1 s")


def test_the_clock_of_headers_does_not_run_for_bodies_and_answers(monkeypatch, echo, port):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    inside = echo.inside
    with Wire(port) as body, Wire(port) as answer, Wire(port) as late:
        body.send("POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n")
        answer.send(GET.format("/held"))
        until(lambda: echo.inside == inside + 1)
        late.send("GET ")
        is_error(late, 408, "the headers did not come")  # the time is over
        body.send("x")
        assert body.answer()[::2] == (200, b"POST /a 1")
        echo.held.set()
        assert answer.answer()[::2] == (200, b"GET /held 0")


@pytest.mark.parametrize(
    "garbage",
    [
        "garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        "GET / HTTP/1.1\r\nno colon\r\n\r\n",
        "GET /\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n".encode("latin-1"),
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n",
        "GET http://[ HTTP/1.1\r\nhost: a\r\n\r\n",
    ],
    ids=["words", "TLS", "header", "path", "negative", "length", "lengths", "smuggling", "url"],
)
def test_what_is_no_http_is_refused(wire, garbage):
    wire.send(garbage)
    is_error(wire, 400, "Invalid HTTP request")


def test_a_connection_is_kept_for_many_requests(wire):
    for i in range(20):
        wire.send(f"POST /{i} HTTP/1.1\r\nhost: a\r\ncontent-length: {i}\r\n\r\n", bytes(i))
        status, headers, body = wire.answer()
        assert (status, body) == (200, f"POST /{i} {i}".encode())
        assert "connection" not in headers


def test_a_connection_ends_where_the_client_wants_it(port):
    for last in ("GET /a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", "GET /a HTTP/1.0\r\n\r\n"):
        with Wire(port) as wire:
            wire.send(last)
            assert wire.answer()[::2] == (200, b"GET /a 0")
            assert wire.answer() is None


def test_requests_in_one_packet_are_answered_in_order(wire):
    posts = [f"POST /{i} HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nab" for i in range(10)]
    wire.send(GET.format("/a"), *posts, GET.format("/b"))
    bodies = [wire.answer()[2] for _ in range(12)]
    assert bodies == [b"GET /a 0", *(f"POST /{i} 2".encode() for i in range(10)), b"GET /b 0"]


def test_a_request_in_pieces_of_one_byte_is_answered(wire):
    for byte in b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nab":
        wire.send(bytes([byte]))
    assert wire.answer()[::2] == (200, b"POST /a 2")


def test_a_client_that_waits_for_leave_to_send_a_body_gets_it(wire):
    wire.send("POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
    assert wire.socket.recv(1000).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    wire.send("ab")
    assert wire.answer()[::2] == (200, b"POST /a 2")


def test_a_wish_for_another_protocol_is_passed_over(wire):
    wire.send("GET /a HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
    assert wire.answer()[::2] == (200, b"GET /a 0")
