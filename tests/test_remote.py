"""A DVC remote in a bucket of moto's S3 server: what one clone pushes, another reproduces without training."""

import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
from clones import commit, ran, run, set_param
from PIL import Image

from barlow.core import files
from barlow.encoder.encoder import Encoder
from flows import process
from flows.process import StepFailed

pytestmark = pytest.mark.slow

# Ends with its standard input: with this process, however that ends.
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
REPRO = ("dvc", "repro", "--pull", "--allow-missing")
TRAINED = ("models/encoder.safetensors", "models/head.safetensors", "models/encoder.onnx")
MISSING = re.compile(r"(?m)^ERROR: .*Checkout failed for following targets:$")


@pytest.fixture
def failed(monkeypatch):
    """`failed(project, "dvc", "push")` runs a command as a flow does and returns the error that it takes from it."""

    def failed(project, *command):
        monkeypatch.chdir(project)
        with pytest.raises(StepFailed) as error:
            process.require(process.run(command, 300, print), command[1], 300)
        return error.value

    return failed


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The address of an S3 server with one bucket, `barlow`; what this machine knows of AWS and DVC is out of sight."""
    own = tmp_path_factory.mktemp("own")
    known = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    known |= {name: str(own / "none") for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")}
    known |= {f"DVC_{name}_DIR": str(own) for name in ("GLOBAL_CONFIG", "SYSTEM_CONFIG", "SITE_CACHE")}
    known |= {"AWS_MAX_ATTEMPTS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command, pipes = [sys.executable, "-c", SERVER], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in known.items():
            patch.setenv(name, value)
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes) as server:
            port = int(server.stdout.readline())
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
                connection.request("PUT", "/barlow")
                assert connection.getresponse().status == 200
            yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, reproduced, s3):
    """The clone that has pushed all it made, and committed the rest."""
    project = tmp_path_factory.mktemp("pushed") / "barlow"
    shutil.copytree(reproduced, project, symlinks=True)
    run(project, "dvc", "remote", "add", "--default", "bucket", "s3://barlow/dvc")
    run(project, "dvc", "remote", "modify", "bucket", "endpointurl", s3)
    assert re.search(r"(?m)^\d\d+ files pushed$", run(project, "dvc", "push"))
    commit(project)
    return project


@pytest.fixture
def other(tmp_path, pushed):
    """Another clone: it has what is in git, and the address of the bucket."""
    run(tmp_path, "git", "clone", "--quiet", str(pushed), "other")
    return tmp_path / "other"


def hashes(project):
    """Return hashes of what the stages wrote, but for what `ingest` draws again where it is missed."""
    paths = [path for name in ("data", "models", "reports") for path in (project / name).rglob("*") if path.is_file()]
    names = [str(path.relative_to(project)) for path in paths]
    return {name: files.sha256(project / name) for name in names if not re.match(r"data/(raw/|\.)", name)}


def test_another_clone_has_everything_without_running_a_stage(pushed, other):
    expected = hashes(pushed)
    assert set(TRAINED) <= set(expected)
    assert ran(run(other, *REPRO)) == []
    assert not set(TRAINED) & set(hashes(other))  # nothing has changed: nothing was needed, nothing was pulled
    run(other, "dvc", "pull")
    assert hashes(other) == expected
    assert ran(run(other, *REPRO)) == []
    assert run(other, "git", "status", "--porcelain") == ""


def test_another_clone_reproduces_a_change_without_training(pushed, other):
    """What the stage that changed reads is pulled, and no more; no stage before it runs."""
    set_param(other, "report:\n  images: 4", "report:\n  images: 3")
    assert ran(run(other, *REPRO)) == ["report"]
    expected, found = hashes(pushed), hashes(other)
    assert {name for name in found if found[name] != expected[name]} == {"reports/index.html"}
    assert "models/encoder.onnx" in found
    assert not {"data/manifest.parquet", "models/head.safetensors"} & set(found)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    one, two = (Encoder(project / "models/encoder.onnx").embed([picture]) for project in (pushed, other))
    assert one.shape == (1, 512)
    assert (one == two).all()


def test_what_nobody_has_pushed_is_missed_not_trained(other):
    run(other, "dvc", "remote", "modify", "bucket", "url", "s3://barlow/empty")
    set_param(other, "report:\n  images: 4", "report:\n  images: 3")
    said = run(other, *REPRO, code=255)
    assert MISSING.search(said)
    assert ran(said) == []
    assert MISSING.search(run(other, "dvc", "pull", code=1))
    assert "do not exist neither locally nor on remote" in run(other, "dvc", "pull", "--allow-missing")
    assert not set(TRAINED) & set(hashes(other))


@pytest.fixture
def closed():
    """The address of a port that nobody listens on, held so that nobody else can."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.mark.parametrize("command", [("dvc", "pull"), REPRO, ("dvc", "push")], ids=["pull", "repro", "push"])
def test_a_remote_that_is_not_reached_may_be_later(pushed, other, tmp_path, closed, failed, command):
    project = other
    if "push" in command:
        project = shutil.copytree(pushed, tmp_path / "pushed", symlinks=True)
    run(project, "dvc", "remote", "modify", "bucket", "endpointurl", closed)
    error = failed(project, *command)
    assert error.passes
    assert f'Could not connect to the endpoint URL: "{closed}/barlow' in str(error)


def test_a_bucket_that_does_not_exist_will_not(other, failed):
    run(other, "dvc", "remote", "modify", "bucket", "url", "s3://nowhere/dvc")
    for command in ("pull", "push"):
        error = failed(other, "dvc", command)
        assert not error.passes
        assert "The specified bucket does not exist" in str(error)


def test_no_remote(other, failed):
    run(other, "dvc", "remote", "remove", "bucket")
    assert "config file error: no remote specified" in str(failed(other, "dvc", "push"))
    assert MISSING.search(run(other, "dvc", "pull", code=1))
    assert "No remote provided" in run(other, "dvc", "pull", "--allow-missing")  # and exit code 0: ask before
