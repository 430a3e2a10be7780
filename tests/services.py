"""Helpers for the tests of the service: `barlow serve` in a process or a thread, images, metrics and raw sockets."""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httptools
import httpx
import numpy as np
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

DEADLINE = 120  # seconds to start, on a busy machine


@dataclass
class Service:
    """A service that is ready; `log` is what it has printed so far."""

    port: int
    process: subprocess.Popen
    logfile: Path
    seconds: float  # from its start until it was ready

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self):
        return self.logfile.read_text()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def start(model, *flags, env=None, cwd=None, port=None, host="127.0.0.1"):
    """Run `barlow serve --model model --port FREE flags`, wait until it is ready, and end it afterwards.

    `env` is added to the environment; `host` is the address of --host as written in a URL. The service runs in `cwd`,
    by default the model's folder: its log is there, and it looks for an index in models/index.
    """
    model, port, begun = Path(model).absolute(), port or free_port(), time.monotonic()
    folder = Path(cwd or model.parent)
    logfile = folder / f"serve-{port}.log"
    command = [sys.executable, "-m", "barlow.cli", "serve", "--model", model, "--port", port, *flags]
    with logfile.open("w") as log:
        process = subprocess.Popen(
            [*map(str, command)], stdout=log, stderr=log, env=os.environ | (env or {}), cwd=folder
        )
    try:
        until(lambda: process.poll() is not None or ready(port, host), DEADLINE, "the service did not start")
        assert process.poll() is None, logfile.read_text()
        yield Service(port, process, logfile, time.monotonic() - begun)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            finally:
                process.kill()
                process.wait()


def ready(port, host="127.0.0.1"):
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/v2/health/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def until(condition, seconds=60.0, why="the condition did not become true"):
    """Call `condition` every few milliseconds, and return its first true value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, why
        time.sleep(0.005)
    return value


def png(*colour, size=(4, 3)):
    """Return a PNG file of one colour, which `mean_onnx` gives as its embedding; `size` is (width, height)."""
    return encoded(np.full((size[1], size[0], 3), colour, np.uint8))


def encoded(pixels, kind="PNG", **options):
    """Return a file with these pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def figure(text, name, **labels):
    """Return a value from the text of /metrics; 0 if it is not there yet, as Prometheus would assume."""
    text = text.decode() if isinstance(text, bytes) else text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return next((s.value for s in samples if s.name == name and s.labels == labels), 0)


@contextmanager
def hosting(application):
    """Serve an ASGI application with barlow's protocol in a thread of this process, and yield the port."""
    from barlow.serving.connection import Protocol

    config = uvicorn.Config(application, http=Protocol, ws="none", log_config=None, access_log=False, lifespan="auto")
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), DEADLINE)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(DEADLINE)
        listener.close()


class Wire:
    """A raw connection that sends any bytes; httptools parses the answers."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self.parser, self.answers, self._begun = httptools.HttpResponseParser(self), [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, *parts):
        self.socket.sendall(b"".join(part.encode() if isinstance(part, str) else part for part in parts))

    def answer(self):
        """Return (status, headers, body) of the next answer, or None where the server closed instead."""
        while not self.answers:
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self.parser.feed_data(data)
        return self.answers.pop(0)

    def on_message_begin(self):
        self._begun = [{}, b""]

    def on_header(self, name, value):
        self._begun[0][name.decode().lower()] = value.decode()

    def on_body(self, body):
        self._begun[1] += body

    def on_message_complete(self):
        self.answers.append((self.parser.get_status_code(), *self._begun))


def client(url, **options):
    """A client of the service at `url`."""
    return httpx.Client(base_url=url, trust_env=False, timeout=30, **options)


def files_of(*images):
    """The files of a form, one per image."""
    return [("files", (f"{i}.png", image)) for i, image in enumerate(images)]
