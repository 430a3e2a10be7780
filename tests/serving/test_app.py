import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from services import client, encoded, figure, files_of, hosting, png, start

from barlow import __version__
from barlow.core.errors import UserError
from barlow.serving.app import app
from barlow.serving.metrics import Metrics


class Links(HTMLParser):
    """The links of a page, and the files that it loads."""

    def __init__(self, text):
        super().__init__()
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "srcset", "data")]


@pytest.fixture
def service(tmp_path, mean_onnx):
    """A client of the application in a thread of this process."""
    model = mean_onnx(tmp_path / "encoder.onnx", ["r", "g", "b"])
    with hosting(app(model, tmp_path)) as port, client(f"http://127.0.0.1:{port}") as connected:
        yield connected


def test_the_page_may_load_nothing_from_elsewhere(service):
    answer = service.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for sources in policy.values():
        assert set(sources.split()) <= {"'self'", "'none'", "'unsafe-inline'", "blob:", "data:"}
    elsewhere = [link for link in Links(answer.text).links if re.match(r"(\w+:)?//", link)]
    assert elsewhere == []


def test_the_description_loads_its_parts_from_the_service(service):
    for page in ("/docs", "/redoc"):
        answer = service.get(page)
        assert answer.status_code == 200
        assert not re.search(r"(https?:)?//[\w.-]+\.\w", answer.text.replace("http://www.w3.org", ""))
        links = [link for link in Links(answer.text).links if not link.startswith("data:")]
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


@pytest.mark.parametrize("path", ["/", "/v2/health/ready", "/v1/model", "/metrics", "/openapi.json"])
def test_head_is_answered_like_get_without_a_body(service, path):
    answer = service.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == service.get(path).headers["content-type"]


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


def test_the_application_is_refused_a_model_as_the_command_is(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        app(tmp_path / "encoder.onnx")
