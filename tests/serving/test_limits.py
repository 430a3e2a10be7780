import asyncio
import base64
import json

import httpx
import pytest
from services import Wire, figure, hosting, png, until
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from barlow.serving import limits
from barlow.serving.app import app
from barlow.serving.limits import Guard, RequestError
from barlow.serving.metrics import Metrics
from barlow.settings.flags import Flags

GONE, NEVER = object(), object()  # parts of a body: the client goes away; nothing comes any more


class Service:
    """A guard around a router with some paths, and what became of the requests that it was asked."""

    def __init__(self, token=None, **flags):
        self.release, self.inside, self.seen, self.metrics = asyncio.Event(), 0, [], Metrics()
        posts = {"/echo": self.echo, "/wait": self.wait, "/bug": self.bug, "/refuse": self.refuse}
        router = Router([Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()])
        for path in ("/items/{number}", "/v2/health/live"):
            router.add_route(path, self.item, methods=["GET"])
        router.add_route("/late", self.late, methods=["POST"])
        self.guard = Guard(router, Flags(**flags), self.metrics, token)

    async def item(self, request):
        return JSONResponse(request.path_params.get("number", 0))

    async def late(self, request):
        """A bug that shows when the answer has begun."""

        async def answer(scope, receive, send):
            await Response()(scope, receive, send)
            raise ZeroDivisionError("a bug")

        return answer

    async def echo(self, request):
        self.seen.append(await request.body())
        return JSONResponse(len(self.seen[-1]))

    async def wait(self, request):
        self.inside += 1
        await self.release.wait()
        return Response()

    async def bug(self, request):
        raise ZeroDivisionError("a bug")

    async def refuse(self, request):
        raise RequestError(415, "format", "no image")

    def figure(self, name, **labels):
        return figure(self.metrics.text(), name, **labels)

    async def ask(self, method, path, *parts, length=True, **headers):
        """Return (status, headers, body) of the answer, or None where there is none."""
        parts = list(parts or [b""])
        if length and method == "POST" and all(isinstance(part, bytes) for part in parts):
            headers.setdefault("content_length", str(sum(map(len, parts))))
        sent = []

        async def receive():
            if not parts:
                await asyncio.Event().wait()
            if parts[0] is NEVER:
                await asyncio.Event().wait()
            if parts[0] is GONE:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "server": ("test", 80), "client": ("test", 1),
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        await self.guard(scope, receive, send)
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], answered, sent[1]["body"]

    async def waiting(self, *requests):
        """Send requests that stay until `release` is set; return their tasks once all are there."""
        tasks = [asyncio.create_task(self.ask(*request)) for request in requests]
        while self.inside < len(tasks):
            await asyncio.sleep(0)
        return tasks


def go(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


def is_error(answer, status, why=""):
    assert answer[0] == status
    assert answer[1]["content-type"] == "application/json"
    body = json.loads(answer[2])
    assert [*body] == ["error"]
    assert why in body["error"]
    return True


def test_the_body_reaches_the_handler_in_one_piece():
    async def story():
        service = Service()
        assert (await service.ask("POST", "/echo", b"ab", b"", b"cd"))[2] == b"4"
        assert (await service.ask("POST", "/echo"))[2] == b"0"
        assert service.seen == [b"abcd", b""]

    go(story())


@pytest.mark.parametrize(
    "header", [None, "", "secret", "Bearer", "Bearer wrong", "Bearer secre", "Bearer secrets", "Basic secret"]
)
def test_without_the_token_there_is_no_answer(header):
    async def story():
        service = Service(token="secret")
        headers = {} if header is None else {"authorization": header}
        for method, path in (("POST", "/echo"), ("GET", "/items/1"), ("GET", "/nowhere")):
            answer = await service.ask(method, path, **headers)
            assert is_error(answer, 401, "Authorization: Bearer TOKEN")
            assert answer[1]["www-authenticate"] == "Bearer"
        assert service.seen == []
        assert service.figure("barlow_rejects_total", reason="token") == 3
        assert (await service.ask("GET", "/v2/health/live", **headers))[0] == 200

    go(story())


def test_with_the_token_there_is():
    async def story():
        service = Service(token="secret")
        for method, path in (("POST", "/echo"), ("GET", "/items/1")):
            assert (await service.ask(method, path, authorization="Bearer secret"))[0] == 200

    go(story())


def test_a_body_that_says_it_is_too_long_is_not_read():
    async def story():
        service = Service(max_body_bytes=100)
        answer = await service.ask("POST", "/echo", NEVER, content_length="101")
        assert is_error(answer, 413, "more than the 100 bytes allowed")
        assert answer[1]["connection"] == "close"
        assert is_error(await service.ask("POST", "/echo", NEVER, content_length="many"), 413)
        assert service.figure("barlow_rejects_total", reason="body") == 2
        assert (await service.ask("POST", "/echo", bytes(100)))[0] == 200

    go(story())


def test_a_body_of_unknown_length_is_counted():
    async def story():
        service = Service(max_body_bytes=100)
        assert (await service.ask("POST", "/echo", bytes(60), bytes(40), length=False))[2] == b"100"
        answer = await service.ask("POST", "/echo", bytes(60), bytes(41), NEVER)
        assert is_error(answer, 413, "more than the 100 bytes allowed")
        assert answer[1]["connection"] == "close"

    go(story())


def test_a_slow_body_is_given_up(monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.05)

    async def story():
        service = Service()
        answer = await service.ask("POST", "/echo", b"a", NEVER)
        assert is_error(answer, 408, "within 0.05 s")
        assert answer[1]["connection"] == "close"
        assert service.figure("barlow_rejects_total", reason="slow") == 1
        assert service.seen == []

    go(story())


def test_more_requests_at_a_time_than_allowed_are_refused_but_health_answers():
    async def story():
        service = Service(max_concurrent=2)
        tasks = await service.waiting(("POST", "/wait"), ("POST", "/wait"))
        for method, path in (("POST", "/echo"), ("GET", "/items/1")):
            answer = await service.ask(method, path)
            assert is_error(answer, 429, "more than 2 requests at a time")
            assert answer[1]["retry-after"] == "1"
        assert service.figure("barlow_rejects_total", reason="concurrency") == 2
        assert (await service.ask("GET", "/v2/health/live"))[0] == 200
        service.release.set()
        assert [answer[0] for answer in await asyncio.gather(*tasks)] == [200, 200]
        assert (await service.ask("POST", "/echo"))[0] == 200

    go(story())


def test_more_bytes_at_a_time_than_allowed_are_refused(monkeypatch):
    monkeypatch.setattr(limits, "BODIES", 2)

    async def story():
        service = Service(max_body_bytes=100)
        tasks = await service.waiting(("POST", "/wait", bytes(100)), ("POST", "/wait", bytes(99)))
        assert (await service.ask("POST", "/echo", bytes(1)))[0] == 200
        answer = await service.ask("POST", "/echo", bytes(2))
        assert is_error(answer, 429, "too many bytes")
        assert answer[1]["retry-after"] == "1"
        assert service.figure("barlow_rejects_total", reason="bytes") == 1
        service.release.set()
        assert [answer[0] for answer in await asyncio.gather(*tasks)] == [200, 200]
        assert (await service.ask("POST", "/echo", bytes(100)))[0] == 200

    go(story())


def test_bytes_of_bodies_that_are_still_coming_count(monkeypatch):
    monkeypatch.setattr(limits, "BODIES", 2)

    async def story():
        service = Service(max_body_bytes=100)
        slow = [asyncio.create_task(service.ask("POST", "/echo", bytes(99), NEVER)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert (await service.ask("POST", "/echo", bytes(2)))[0] == 200
        assert is_error(await service.ask("POST", "/echo", bytes(3)), 429)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert (await service.ask("POST", "/echo", bytes(100)))[0] == 200

    go(story())


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (200, ("POST", "/echo", bytes(100))),
        (200, ("GET", "/items/3")),
        (400, ("POST", "/echo", GONE)),
        (400, ("POST", "/echo", bytes(70), GONE)),
        (404, ("GET", "/nowhere")),
        (404, ("POST", "/nowhere", bytes(100))),
        (405, ("POST", "/items/3", bytes(100))),
        (408, ("POST", "/echo", bytes(70), NEVER)),
        (413, ("POST", "/echo", bytes(70), bytes(70), NEVER)),
        (413, ("POST", "/echo", bytes(101))),
        (415, ("POST", "/refuse", bytes(100))),
        (500, ("POST", "/bug", bytes(100))),
    ],
)
def test_after_every_outcome_all_is_free_again_and_it_was_counted_once(monkeypatch, status, request_):
    monkeypatch.setattr(limits, "BODIES", 1)
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.02)

    async def story():
        service = Service(max_body_bytes=100, max_concurrent=1)
        for _ in range(3):
            assert (await service.ask(*request_))[0] == status
            assert (await service.ask("POST", "/echo", bytes(100)))[0] == 200
        path = request_[1].replace("/items/3", "/items/{number}").replace("/nowhere", "other")
        again = 3 if (path, status) == ("/echo", 200) else 0
        assert service.figure("barlow_requests_total", path=path, status=str(status)) == 3 + again
        assert service.figure("barlow_requests_total", path="/echo", status="200") == 3 + again

    go(story())


def test_after_a_cancelled_request_all_is_free_again(monkeypatch):
    monkeypatch.setattr(limits, "BODIES", 1)

    async def story():
        service = Service(max_body_bytes=100, max_concurrent=1)
        (task,) = await service.waiting(("POST", "/wait", bytes(100)))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        coming = asyncio.create_task(service.ask("POST", "/echo", bytes(50), NEVER))
        await asyncio.sleep(0.01)
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        assert (await service.ask("POST", "/echo", bytes(100)))[0] == 200

    go(story())


def test_a_bug_in_a_handler_is_an_error_in_json_and_logged_once(caplog):
    async def story():
        service = Service()
        assert is_error(await service.ask("POST", "/bug"), 500, "a bug in the service; its log says more")
        assert service.figure("barlow_requests_total", path="/bug", status="500") == 1

    go(story())
    (record,) = caplog.records
    assert record.getMessage() == "POST /bug"
    assert record.exc_info[0] is ZeroDivisionError


def test_a_bug_after_the_beginning_of_an_answer_is_logged_and_changes_nothing(caplog):
    async def story():
        service = Service()
        assert (await service.ask("POST", "/late"))[0] == 200
        assert service.figure("barlow_requests_total", path="/late", status="200") == 1

    go(story())
    assert [record.getMessage() for record in caplog.records] == ["POST /late"]


def test_a_wrong_method_is_told_the_right_ones():
    async def story():
        status, headers, body = await Service().ask("DELETE", "/echo")
        assert (status, headers["allow"], json.loads(body)) == (405, "POST", {"error": "Method Not Allowed"})

    go(story())


def test_unknown_paths_share_one_series():
    async def story():
        service = Service()
        for i in range(50):
            assert (await service.ask("GET", f"/{i}"))[0] == 404
            assert (await service.ask("GET", f"/items/{i}"))[0] == 200
        return service

    service = go(story())
    assert service.figure("barlow_requests_total", path="other", status="404") == 50
    assert service.figure("barlow_requests_total", path="/items/{number}", status="200") == 50
    assert service.metrics.text().count(b"\nbarlow_requests_total{") == 2


def test_a_refused_post_is_counted_under_its_path_and_other_refused_requests_together():
    async def story():
        service = Service(token="secret")
        for method, path in (("POST", "/echo"), ("GET", "/items/1"), ("GET", "/nowhere")):
            assert (await service.ask(method, path))[0] == 401
        assert service.figure("barlow_requests_total", path="/echo", status="401") == 1
        assert service.figure("barlow_requests_total", path="other", status="401") == 2

    go(story())


def test_the_life_of_the_server_reaches_the_router():
    seen = []

    async def router(scope, receive, send):
        seen.append(scope["type"])

    router.routes = []
    asyncio.run(Guard(router, Flags(), Metrics(), None)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


def test_clients_that_go_away_leave_nothing_behind_on_a_real_socket(tmp_path, mean_onnx):
    application = app(mean_onnx(tmp_path / "encoder.onnx"), tmp_path, Flags(max_concurrent=4))
    head = "POST /v1/embed HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n"
    with hosting(application) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

        def answers(status):
            metrics = client.get("/metrics")
            return metrics.status_code == 200 and figure(
                metrics.text, "barlow_requests_total", path="/v1/embed", **status
            )

        for _ in range(3):
            for _ in range(4):
                with Wire(port) as wire:
                    wire.send(head, bytes(50))
                    until(lambda: client.get("/v2/health/live").status_code == 200)
        until(lambda: answers({"status": "400"}) == 12)
        body = b'{"images": ["' + base64.b64encode(png(1, 2, 3)) + b'"]}'
        for _ in range(4):
            with Wire(port) as wire:
                json_head = head.replace("100", str(len(body))).replace("host: a", "content-type: application/json")
                wire.send(json_head, body)  # and goes before the answer comes
        until(lambda: answers({"status": "200"}) == 4)
        assert client.post("/v1/embed", json={"images": ["AA=="]}).status_code == 415


def test_a_client_that_sends_too_much_can_read_why(tmp_path, mean_onnx):
    application = app(mean_onnx(tmp_path / "encoder.onnx"), tmp_path, Flags(max_body_bytes=2**20))
    body = bytes(8 * 2**20)
    with hosting(application) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        for content in (body, iter([body] * 4)):  # the latter chunked
            answer = client.post("/v1/embed", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 413
            assert answer.json() == {"error": "the request has more than the 1048576 bytes allowed"}
