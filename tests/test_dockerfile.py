import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path
from urllib.error import URLError

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
FORBIDDEN = ["torch", "torchvision", "nvidia", "dvc", "prefect", "great_expectations", "pandas", "pyarrow", "onnx"]


def parse(text):
    """Return the Dockerfile's stages in order: {name: (base, [(instruction, argument), ...])}."""
    text = re.sub(r"(?m)^#.*\n", "", text).replace("\\\n", " ")
    stages = {}
    for line in filter(str.strip, text.splitlines()):
        instruction, argument = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = argument.partition(" AS ")
            stages[name] = (base, [])
        else:
            [*stages.values()][-1][1].append((instruction, argument))
    return stages


STAGES = parse((ROOT / "Dockerfile").read_text())


def instructions(stage, *kinds):
    """Return the arguments of a stage's instructions, those that it inherits first."""
    base, own = STAGES[stage]
    inherited = instructions(base, *kinds) if base in STAGES else []
    return inherited + [argument.strip() for instruction, argument in own if instruction in kinds]


def pins(path):
    """Return {(name, version): hashes} of a lock."""
    entries = re.findall(r"(?m)^([\w.-]+)==(\S+) ;.*((?:\\\n +--hash=\S+ ?)+)", path.read_text())
    return {(name, version): set(re.findall(r"--hash=(\S+)", hashes)) for name, version, hashes in entries}


def test_stages_and_default():
    assert {"train", "serve"} <= set(STAGES)
    assert [*STAGES][-1] == "serve"


def test_bases_are_pinned_to_a_version():
    outside = [base for base, _ in STAGES.values() if base not in STAGES]
    assert outside
    assert all(re.fullmatch(r"python:3\.1[0-3]-slim-\w+(@sha256:[0-9a-f]{64})?", base) for base in outside)


@pytest.mark.parametrize("stage", ["train", "serve"])
def test_ends_as_a_numbered_user_that_is_not_root(stage):
    own = [instruction for instruction, _ in STAGES[stage][1]]
    user = instructions(stage, "USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # a number, so that Kubernetes can tell that it is not root
    assert own.index("USER") > max(index for index, name in enumerate(own) if name in ("RUN", "COPY"))


@pytest.mark.parametrize("stage", ["train", "serve"])
def test_nothing_is_fetched_past_the_locks(stage):
    assert instructions(stage, "ADD") == []
    for command in instructions(stage, "RUN"):
        assert "://" not in command
        if "pip install" in command:
            assert "--require-hashes" in command or "--no-deps --no-build-isolation" in command


@pytest.mark.parametrize("stage", ["train", "serve"])
def test_what_is_copied_is_in_the_build_context(stage):
    ignored, *kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == "*"
    for argument in instructions(stage, "COPY"):
        for source in argument.split()[:-1]:
            assert any(line.removeprefix("!").split("/")[0] == source for line in kept), source
            assert (ROOT / source).exists(), source


def test_health_is_asked_where_the_server_answers():
    [check], command = instructions("serve", "HEALTHCHECK"), json.loads(instructions("serve", "CMD")[-1])
    port = command[command.index("--port") + 1]
    assert instructions("serve", "EXPOSE") == [port]
    assert f"http://127.0.0.1:{port}/v2/health/ready" in check


def test_the_serving_lock_is_part_of_the_lock():
    whole, part = pins(ROOT / "requirements.lock"), pins(ROOT / "requirements-serve.lock")
    assert len(part) > 15
    assert {pin: whole.get(pin) for pin in part} == part
    names = {name for name, _ in part}
    assert {"fastapi", "numpy", "onnxruntime", "pillow", "python-multipart", "uvicorn"} <= names
    assert not names & {name.replace("_", "-") for name in FORBIDDEN}
    assert "://" not in (ROOT / "requirements-serve.lock").read_text()


def wait_until_ready(url, process, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                return answer.status
        except (URLError, OSError):
            time.sleep(0.05)
    return None


@pytest.mark.slow
def test_the_serving_stage_works_in_a_clean_environment(tmp_path, mean_onnx):
    """Do as the stage says, in a virtual environment instead of a container; /app lies in `tmp_path`."""
    app, variables = tmp_path / "app", {}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=120)
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "HTTP", "SSL", "HOME"))}
    for instruction, argument in STAGES[STAGES["serve"][0]][1] + STAGES["serve"][1]:
        environment = passed_on | variables | {"PATH": f"{tmp_path}/venv/bin:/usr/bin:/bin"}
        if instruction == "WORKDIR":
            assert argument == "/app"
            app.mkdir()
        elif instruction == "ENV":
            pairs = (pair.split("=", 1) for pair in argument.split())
            variables |= {name: value.replace("/app", str(app)) for name, value in pairs}
        elif instruction == "COPY":
            source, target = argument.split()
            if (ROOT / source).is_file():
                shutil.copy(ROOT / source, app / target)
            elif source != "models":
                shutil.copytree(ROOT / source, app / target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif instruction == "RUN":
            subprocess.run(argument, shell=True, check=True, cwd=app, env=environment, timeout=300)
    environment |= variables

    probe = f"from importlib.util import find_spec; print([name for name in {FORBIDDEN} if find_spec(name)])"
    found = subprocess.run(
        ["python", "-c", probe], cwd=app, env=environment, capture_output=True, text=True, timeout=60
    )
    assert found.stdout == "[]\n", found.stderr

    installed = sum(path.stat().st_size for path in (tmp_path / "venv/lib").rglob("*") if path.is_file())
    assert installed < 300 * 2**20  # pip and setuptools are 25 MiB of it

    command = json.loads(instructions("serve", "CMD")[-1])
    missing = subprocess.run(command, cwd=app, env=environment, capture_output=True, text=True, timeout=60)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "models/encoder.onnx is missing" in missing.stderr

    mean_onnx(app / "models/encoder.onnx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command[command.index("--host") + 1], command[command.index("--port") + 1] = "127.0.0.1", port
    server = subprocess.Popen(command, cwd=app, env=environment, start_new_session=True)
    try:
        assert wait_until_ready(f"http://127.0.0.1:{port}/v2/health/ready", server, seconds=120) == 200
        assert post_image(f"http://127.0.0.1:{port}/v1/embed", (10, 20, 30))["results"][0]["embedding"] == [10, 20, 30]
        server.terminate()
        assert server.wait(timeout=20) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait(timeout=20)


def post_image(url, colour):
    image, boundary = io.BytesIO(), uuid.uuid4().hex
    Image.new("RGB", (5, 4), colour).save(image, "PNG")
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head.encode() + image.getvalue() + f"\r\n--{boundary}--\r\n".encode()
    request = urllib.request.Request(url, body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)
