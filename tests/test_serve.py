import base64
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from services import Wire, encoded, figure, free_port, hosting, png, start, until

from barlow import __version__, cli, serve
from barlow.core.errors import UserError
from barlow.serving.metrics import Metrics

HEAVY = ("torch", "torchvision", "nvidia", "dvc", "prefect", "pandas", "pyarrow", "great_expectations", "onnx", "yaml")


def client(url, **options):
    return httpx.Client(base_url=url, trust_env=False, timeout=30, **options)


@pytest.fixture
def service(tmp_path, mean_onnx):
    """A client of the application in a thread of this process."""
    model = mean_onnx(tmp_path / "encoder.onnx", ["r", "g", "b"])
    with hosting(serve.app(model, tmp_path)) as port, client(f"http://127.0.0.1:{port}") as found:
        yield found


def files_of(*images):
    return [("files", (f"{i}.png", image)) for i, image in enumerate(images)]


def test_a_process_is_ready_soon_and_says_where(tmp_path, mean_onnx):
    with start(mean_onnx(tmp_path / "encoder.onnx")) as service, client(service.url) as asked:
        print(f"ready after {service.seconds:.2f} s")
        assert service.seconds < 5  # 0.5 on two idle cores
        assert f"at {service.url}; its interface is described at /docs\n" in service.log
        answer = asked.post("/v1/embed", files=files_of(png(10, 20, 30)))
        assert answer.json()["results"] == [{"name": "0.png", "embedding": [10, 20, 30]}]
        libraries = Path(f"/proc/{service.process.pid}/maps").read_text()
        assert "onnxruntime" in libraries
        for name in HEAVY:
            assert f"/site-packages/{name}/" not in libraries


def test_nothing_heavy_is_imported(tmp_path, mean_onnx):
    script = f"""
import sys
from barlow import cli, serve
cli.parser()
serve.app(sys.argv[1], sys.argv[2])
print([name for name in {HEAVY} if name in sys.modules])
"""
    command = [sys.executable, "-c", script, mean_onnx(tmp_path / "encoder.onnx"), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_sigterm_answers_what_was_asked_and_ends_the_process(tmp_path, mean_onnx):
    model = mean_onnx(tmp_path / "encoder.onnx")
    image = png(10, 20, 30)
    head = "POST /v1/embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 19\r\n\r\n"
    with start(model, "--max-queue-delay-us", 3_000_000) as service, client(service.url) as asked:
        with Wire(service.port) as slow, Wire(service.port) as idle, ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(asked.post, "/v1/embed", files=files_of(image)) for _ in range(8)]
            slow.send(head, b'{"images":')
            until(lambda: figure(asked.get("/metrics").text, "barlow_queue") == 8)
            service.process.send_signal(signal.SIGTERM)
            until(lambda: "Shutting down" in service.log)
            slow.send(b'["AA=="]}')
            for answer in answers:
                assert answer.result().status_code == 200
                assert answer.result().json()["results"][0]["embedding"] == [10, 20, 30]
            assert slow.answer()[0] == 415  # of the image, which is none
            assert idle.answer() is None
        assert service.process.wait(60) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            asked.get("/v2/health/live")
        assert "Traceback" not in service.log
        assert "Cancel" not in service.log


def test_another_model_is_served_while_requests_go_on(tmp_path, mean_onnx):
    model = mean_onnx(tmp_path / "encoder.onnx")
    with start(model) as service, client(service.url) as asked:
        stop, statuses = threading.Event(), []

        def ask():
            while not stop.is_set():
                statuses.append(asked.post("/v1/embed", files=files_of(png(1, 2, 3))).status_code)

        def reloads(result):
            return figure(asked.get("/metrics").text, "barlow_reloads_total", result=result)

        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask)
            try:
                mean_onnx(tmp_path / "new.onnx", ["r", "g", "b"]).replace(model)
                until(lambda: reloads("done") == 1)
                assert asked.post("/v1/classify", files=files_of(png(1, 200, 3))).json()["results"][0]["class"] == "g"
                model.write_text("I am a text")
                until(lambda: reloads("refused") == 1)
            finally:
                stop.set()
            asking.result()
        assert len(statuses) > 10
        assert set(statuses) == {200}
        assert "encoder.onnx is refused, and encoder.onnx goes on: " in service.log


def test_the_token_is_in_the_environment(tmp_path, mean_onnx):
    with start(mean_onnx(tmp_path / "encoder.onnx"), env={"BARLOW_TOKEN": "open sesame"}) as service:
        with client(service.url) as asked:
            answer = asked.post("/v1/embed", files=files_of(png(1, 2, 3)))
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert asked.get("/metrics").status_code == 401
            for path in ("/", "/docs", "/openapi.json", "/v2", "/v2/health/live", "/v2/health/ready"):
                assert asked.get(path).status_code == 200
            asked.headers["authorization"] = "Bearer open sesame"
            assert asked.post("/v1/embed", files=files_of(png(1, 2, 3))).status_code == 200
            assert asked.get("/metrics").status_code == 200
        assert "sesame" not in service.log


def test_nothing_of_an_application_goes_on_after_its_end(tmp_path, mean_onnx):
    before = set(threading.enumerate())
    with hosting(serve.app(mean_onnx(tmp_path / "encoder.onnx"), tmp_path)) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", trust_env=False).status_code == 200
        assert any(thread.name == "barlow" for thread in set(threading.enumerate()) - before)
    assert set(threading.enumerate()) <= before


def run(model, *flags, **options):
    command = [sys.executable, "-m", "barlow.cli", "serve", "--model", model, *flags]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, **options)


def test_an_address_in_use_or_impossible_is_one_line(tmp_path, mean_onnx):
    model = mean_onnx(tmp_path / "encoder.onnx")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(model, "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    wanted = (
        rf"barlow serve: cannot listen on 127\.0\.0\.1 port {port} \(.*in use.*\); choose another --host or --port\n"
    )
    assert re.fullmatch(wanted, done.stderr)
    done = run(model, "--port", free_port(), "--host", "192.0.2.1")  # kept for documentation; no machine has it
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"barlow serve: cannot listen on 192\.0\.2\.1 port .*\n", done.stderr)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--port", "0"], "--port 0 is not allowed; it must be from 1 to 65535"),
        (["--port", "70000"], "--port 70000 is not allowed; it must be from 1 to 65535"),
        (["--max-images", "0"], "--max-images 0 is not allowed; it must be at least 1"),
        (["--max-queue-delay-us", "-1"], "--max-queue-delay-us -1 is not allowed; it must be at least 0"),
        (
            ["--model", "nowhere.onnx"],
            "nowhere.onnx is missing; run `barlow export`, or name another file with --model",
        ),
        (["--model", "text.onnx"], "text.onnx is not a whole ONNX file"),
        (["--model", "circle.onnx"], "circle.onnx is missing"),
    ],
    ids=["port 0", "port 70000", "setting", "delay", "missing", "damaged", "circle"],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, mean_onnx, monkeypatch, capsys, flags, why):
    monkeypatch.chdir(tmp_path)
    mean_onnx(tmp_path / "models/encoder.onnx")
    (tmp_path / "text.onnx").write_text("I am a text")
    (tmp_path / "circle.onnx").symlink_to("circle.onnx")
    assert cli.main(["serve", *flags]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(rf"barlow serve: .*{re.escape(why)}.*\n", told.err)


def test_the_application_is_refused_a_model_as_the_command_is(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        serve.app(tmp_path / "encoder.onnx")


def ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_is_listened_on_and_told_as_a_url(tmp_path, mean_onnx):
    with start(mean_onnx(tmp_path / "encoder.onnx"), "--host", "::1", host="[::1]") as service:
        assert f" at http://[::1]:{service.port}; " in service.log


class Links(HTMLParser):
    """What a page loads or leads to."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "action", "srcset", "data")]


def test_the_page_may_load_nothing_from_elsewhere(service):
    answer = service.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for sources in policy.values():
        assert set(sources.split()) <= {"'self'", "'none'", "'unsafe-inline'", "blob:", "data:"}
    elsewhere = [link for link in Links(answer.text).found if re.match(r"(\w+:)?//", link)]
    assert elsewhere == []


def test_the_description_loads_its_parts_from_the_service(service):
    for page in ("/docs", "/redoc"):
        answer = service.get(page)
        assert answer.status_code == 200
        assert not re.search(r"(https?:)?//[\w.-]+\.\w", answer.text.replace("http://www.w3.org", ""))
        links = [link for link in Links(answer.text).found if not link.startswith("data:")]
        assert links
        for link in links:
            assert link.startswith("/")
            part = service.get(link)
            assert part.status_code == 200
            assert len(part.content) > 100
    assert service.get("/openapi.json").json()["info"] == {"title": "Barlow", "version": __version__}


def test_the_figures_are_prometheus_and_count_what_was_asked(service):
    for _ in range(3):
        assert service.post("/v1/embed", files=files_of(png(1, 2, 3), png(4, 5, 6))).status_code == 200
    assert service.post("/v1/embed", files=files_of(b"text", png(1, 2, 3))).status_code == 200
    assert service.post("/v1/embed", files=files_of(b"text")).status_code == 415
    assert service.post("/v1/embed", json={}).status_code == 400
    assert service.get("/v1/index/thumbnails/7").status_code == 503
    for path in ("/a", "/b", "/../etc/passwd"):
        assert service.get(path).status_code == 404
    answer = service.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    requests = {labels: value for (name, labels), value in samples.items() if name == "barlow_requests_total"}
    assert requests == {
        ("/v1/embed", "200"): 4,
        ("/v1/embed", "415"): 1,
        ("/v1/embed", "400"): 1,
        ("/v1/index/thumbnails/{number}", "503"): 1,
        ("other", "404"): 3,
    }
    rejects = {labels: value for (name, labels), value in samples.items() if name == "barlow_rejects_total"}
    assert rejects == {("format",): 2, ("form",): 1, ("index",): 1}
    assert samples["barlow_batch_size_sum", ()] == 7
    assert samples["barlow_queue_seconds_count", ()] == 9
    assert samples["barlow_seconds_count", ("/v1/embed",)] == 6
    assert samples["barlow_model_info", ("mean", "encoder.onnx")] == 1
    assert samples["process_resident_memory_bytes", ()] > 1e7


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v2/models/other", 404),
        ("DELETE", "/v1/embed", 405),
        ("POST", "/metrics", 405),
        ("GET", "/v1/index/map", 503),
        ("GET", "/v1/index/thumbnails/x", 422),
        ("POST", "/v1/search", 503),
    ],
)
def test_every_error_is_json_of_one_kind(service, method, path, status):
    answer = service.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert [*answer.json()] == ["error"]


def test_a_bug_is_an_error_of_the_same_kind_and_logged_once(service, monkeypatch, caplog):
    def text(self):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Metrics, "text", text)
    answer = service.get("/metrics")
    assert (answer.status_code, answer.json()) == (500, {"error": "a bug in the service; its log says more"})
    assert service.get("/v2/health/ready").status_code == 200
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == "GET /metrics"
    assert record.exc_info[0] is ZeroDivisionError


def refused():
    """Requests that are refused for their images, by kind: path, body, headers, status; pixels of 3.6 MB each."""
    rng, pixels = np.random.default_rng(0), np.zeros((1000, 1200, 3), np.uint8)
    pixels[: 12 * 1000 // 25] = rng.integers(0, 4, (1, 1200, 3))
    png_file, jpeg_file = encoded(pixels), encoded(pixels, "JPEG", progressive=True)
    files = {
        "text": (b"I am a text." * 5000, 415),
        "another format": (encoded(pixels, "PPM"), 415),
        "cut PNG": (png_file[:-200], 422),
        "cut JPEG": (jpeg_file[:-200], 422),
        "broken PNG": (png_file[:1000] + b"\xff" * 100 + png_file[1100:], 422),
        "pixels": (encoded(np.zeros((3000, 1200), bool)), 413),
        "a long side": (encoded(np.zeros((1, 2**16 + 1), bool)), 413),
    }
    for kind, (content, status) in files.items():
        yield kind, "/v1/embed", {"files": [("files", ("a.png", content))] * 8}, status
        body = {"images": [base64.b64encode(content).decode()] * 2}
        yield f"{kind}, as JSON", "/v1/classify", {"json": body}, status
    yield "many", "/v1/embed", {"files": [("files", ("a.png", png_file))] * 9}, 413
    yield (
        "form",
        "/v1/embed",
        {"content": png_file, "headers": {"content-type": "multipart/form-data; boundary=a"}},
        400,
    )
    yield "protocol", "/v2/models/encoder/infer", {"content": pixels.tobytes()}, 400


def test_what_is_refused_is_not_kept(tmp_path, mean_onnx):
    """200 images of each kind, and resident memory is where it was; a refusal's traceback once held its image."""
    flags = ("--max-images", 8, "--max-pixels", 2_000_000)
    with start(mean_onnx(tmp_path / "encoder.onnx", ["r", "g", "b"]), *flags) as service, client(service.url) as asked:

        def resident():
            return figure(asked.get("/metrics").text, "process_resident_memory_bytes")

        for kind, path, request, status in refused():
            for i in range(25):
                answer = asked.post(path, **request)
                assert answer.status_code == status, (kind, answer.text)
                if i == 4:  # the allocator has its share by then
                    before = resident()
            assert resident() - before < 50e6, kind
