import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from services import Wire, client, figure, files_of, free_port, hosting, png, start, until

from barlow import cli
from barlow.serving.app import app

HEAVY = ("torch", "torchvision", "nvidia", "dvc", "prefect", "pandas", "pyarrow", "great_expectations", "onnx", "yaml")


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
    with hosting(app(mean_onnx(tmp_path / "encoder.onnx"), tmp_path)) as port:
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
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"barlow serve: .*{re.escape(why)}.*\n", printed.err)


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
