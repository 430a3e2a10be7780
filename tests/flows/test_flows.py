"""The flows against a real Prefect server and worker, with stages that take no time; `barlow promote` is the real one.

Each test begins with an empty registry, and lets the stage `pretrain` wait while it breaks something.
"""

import json
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from barlow import promote
from barlow.settings import loading

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SETTINGS = {
    "margin: 25.0": "margin: 10.0",
    "max_latency_ratio: 2.0": "max_latency_ratio: 1.0e+3",
    "  min_images: 100": "  min_images: 20",
    "  breaches: 3": "  breaches: 1",
}
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
ENGINE = re.compile(r"prefect\.(flow_)?engine")
STAGES = """
import os, shutil, signal, sys
from pathlib import Path

stage, control = sys.argv[1], Path("control")
which = Path("which.txt").read_text().strip()
if stage == "validate" and which == "bad":
    print("barlow validate: the data failed validation:\\ndecodable 0.10, at least 0.99\\nphotos/bad.jpg: empty file")
    sys.exit(3)
if stage == "pretrain":
    tries = len(list(control.glob("try-*")))
    (control / f"try-{tries}").write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, lambda *_: (print("barlow pretrain: stopped at step 7"), os._exit(75)))
    while (control / "hold").exists():
        signal.sigtimedwait([signal.SIGUSR2], 0.05)
if stage == "export":
    shutil.copytree(f"prepared/{which}", ".", dirs_exist_ok=True)
Path("out").mkdir(exist_ok=True)
Path(f"out/{stage}").write_text(which)
"""
DVC = """
stages:
  validate: {cmd: python stages.py validate, deps: [stages.py, which.txt], outs: [out/validate]}
  pretrain: {cmd: python stages.py pretrain, deps: [out/validate], outs: [out/pretrain]}
  export: {cmd: python stages.py export, deps: [out/pretrain], outs: [out/export]}
"""


def until(check, seconds=240):  # long, for a busy machine
    """Call `check` until its result is true, and return the result."""
    give_up = time.monotonic() + seconds
    while not (answer := check()):
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.3)
    return answer


class Box:
    """A server, a worker and a project on this machine."""

    def __init__(self, folder, database):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder, self.project = folder, folder / "project"
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
            "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
            "PREFECT_SERVER_SERVICES_TRIGGERS_PG_NOTIFY_HEARTBEAT_INTERVAL_SECONDS": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_HEARTBEAT_SECONDS": "2",
            **database,
        }
        self.server = self.worker = None
        self.client = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))  # a client is slow to make

    def ask(self, method, path, json=None):
        """Call the API, again if the database is busy, as Prefect's own client does; return the answer."""

        def answer():
            try:
                given = self.client.request(method, self.url + path, json=json, timeout=10 if method == "GET" else 60)
            except httpx.ReadTimeout:
                if method == "GET":
                    return None
                raise  # a second request might do the work twice
            return None if given.status_code == 503 else given

        given = until(answer).raise_for_status()
        return given.json() if given.content else None

    def command(self, *command):
        done = subprocess.run(
            command, cwd=self.project, env=self.environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, *command):
        with (self.folder / f"{command[1]}.log").open("a") as log:
            return subprocess.Popen(
                command, cwd=self.project, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def start_server(self):
        self.server = self.start("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        until(self.healthy)

    def healthy(self):
        assert self.server.poll() is None, (self.folder / "server.log").read_text()
        try:
            return self.client.get(self.url + "/health").status_code == 200
        except httpx.TransportError:
            return False

    def start_worker(self):
        self.worker = self.start("prefect", "worker", "start", "--pool", "local", "--name", "box")

    def kill(self, process):
        process.kill()
        process.wait()

    def stop(self):
        for process in (self.worker, self.server):
            if process and process.poll() is None:
                process.terminate()
                try:
                    process.wait(45)
                except subprocess.TimeoutExpired:
                    self.kill(process)
        self.client.close()

    def deployment(self, name):
        return self.ask("GET", f"/deployments/name/{name}")

    def run(self, name="retrain/retrain-nightly", **parameters):
        """Start a run of a deployment and return its id."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return self.ask("POST", path, {"parameters": parameters})["id"]

    def state(self, run):
        return self.ask("GET", f"/flow_runs/{run}")["state"]

    def ended(self, run):
        """Wait until a run has ended and return its state."""
        return until(lambda: (state := self.state(run))["type"] in ENDED and state)

    def runs(self, name):
        asked = {"deployments": {"name": {"any_": [name.partition("/")[2]]}}}
        return self.ask("POST", "/flow_runs/filter", asked)

    def artifacts(self, run):
        asked = {"flow_runs": {"id": {"any_": [run]}}}
        artifacts = self.ask("POST", "/artifacts/filter", asked)
        return {artifact["key"]: artifact["data"] for artifact in artifacts}

    # The project.

    def reset(self, which="edges", hold=False):
        """Reset the project, whatever an earlier test left."""
        asked = {"flow_runs": {"state": {"type": {"not_any_": sorted(ENDED)}}}}
        for run in self.ask("POST", "/flow_runs/filter", asked):
            self.ask("POST", f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
        for name in ("out", "models", "control", "reports", "dvc.lock", ".dvc/cache", ".dvc/tmp"):
            path = self.project / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (self.project / "control").mkdir()
        if hold:
            (self.project / "control/hold").touch()
        self.which(which)

    def which(self, name):
        (self.project / "which.txt").write_text(name)
        git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
        self.command(*git, "commit", "--quiet", "--allow-empty", "--all", "--message", name)

    def promote(self, name):
        """Promote an encoder by hand, in this process, which has imported torch already."""
        shutil.copytree(self.project / "prepared" / name, self.project, dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.project)
            promote.run(loading.load())

    def release(self):
        (self.project / "control/hold").unlink()

    def pretraining(self, number=0):
        """Wait until `pretrain` runs for the nth time; return its process."""
        path = self.project / f"control/try-{number}"
        until(lambda: path.exists() and path.read_text())
        return psutil.Process(int(path.read_text()))

    def flow(self):
        """Return the process of the flow that runs `pretrain`, and all processes that it started."""
        engine = next(p for p in self.pretraining().parents() if ENGINE.search(" ".join(p.cmdline())))
        return engine, engine.children(recursive=True)

    @property
    def versions(self):
        return sorted(path.name for path in self.project.glob("models/registry/versions/*"))

    @property
    def production(self):
        link = self.project / "models/registry/production"
        return link.readlink().name if link.is_symlink() else None


def gone(processes):
    return not psutil.wait_procs(processes, timeout=240)[1]


@pytest.fixture(scope="module")
def sqlite():
    """Settings of a server that keeps its state in a file."""
    return {}


@pytest.fixture(scope="module")
def postgres():
    """Settings of a server that keeps its state in PostgreSQL, which this starts."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        pytest.skip("PostgreSQL is not installed (as root, `make system` does it)")
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}  # it refuses root
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if user:
            shutil.chown(folder, "postgres")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]

        def run(program, *arguments):
            subprocess.run(
                [binaries[-1] / program, *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL, **user
            )

        run("initdb", "--pgdata", "data", "--username", "prefect", "--auth", "trust", "--no-sync")
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
        run("pg_ctl", "--pgdata", "data", "--log", "log", "--wait", "--options", options, "start")
        try:
            run("createdb", "--host", "127.0.0.1", "--port", str(port), "--username", "prefect", "prefect")
            url = f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
            yield {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
        finally:
            run("pg_ctl", "--pgdata", "data", "--mode", "immediate", "stop")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, small_shards, write_encoder):
    """A project that lacks only a server: stages, settings, encoders to export, a git repository."""
    project = tmp_path_factory.mktemp("prepared") / "project"
    (project / "data").mkdir(parents=True)
    before = Path.cwd()
    for name in ("edges", "other", "noise"):
        folder = project / "prepared" / name
        (folder / "data").mkdir(parents=True)
        (folder / "data/shards").symlink_to(small_shards)
        os.chdir(folder)
        write_encoder(name, ("a", "b", "c", "d"))
        os.chdir(before)
        (folder / "data/shards").unlink()
    (project / "data/shards").symlink_to(small_shards)
    (project / "stages.py").write_text(STAGES)
    (project / "which.txt").write_text("edges")
    (project / "dvc.yaml").write_text(DVC)
    (project / ".dvc").mkdir()
    for name in ("params.yaml", "presets", "flows", "prefect.yaml", "pyproject.toml", ".dvc/config", ".dvc/.gitignore"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, project / name)
    (project / ".gitignore").write_text("/out\n/models\n/control\n/reports\n/data\n/prepared\n__pycache__\n")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (["barlow", "preset", "smoke"], ["git", "init", "--quiet"], ["git", "add", "."]):
        subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True)
    settings = (project / "params.yaml").read_text()
    for old, new in SETTINGS.items():
        assert old in settings
        settings = settings.replace(old, new)
    (project / "params.yaml").write_text(settings)
    deployments = (project / "prefect.yaml").read_text()
    (project / "prefect.yaml").write_text(deployments.replace("retry_seconds: 30", "retry_seconds: 0.1"))
    return project


@pytest.fixture(scope="module")
def box(request, prepared, tmp_path_factory):
    """A server with one of the databases, and a worker."""
    folder = tmp_path_factory.mktemp("box")
    shutil.copytree(prepared, folder / "project", symlinks=True)
    box = Box(folder, request.getfixturevalue(request.param))
    try:
        box.start_server()
        box.command("prefect", "work-pool", "create", "local", "--type", "process")
        box.command("prefect", "--no-prompt", "deploy", "--all")
        box.start_worker()
        yield box
    finally:
        box.stop()


one = pytest.mark.parametrize("box", ["sqlite"], indirect=True)
both = pytest.mark.parametrize("box", ["sqlite", pytest.param("postgres", marks=pytest.mark.soak)], indirect=True)


@both
def test_a_schedule_fires_and_a_second_run_is_cancelled(box):
    box.reset(hold=True)
    path = f"/deployments/{box.deployment('retrain/retrain-nightly')['id']}/schedules"
    before = {run["id"] for run in box.runs("retrain/retrain-nightly")}
    (schedule,) = box.ask("POST", path, [{"active": True, "schedule": {"interval": 4}}])
    try:
        box.pretraining()

        def new(kind):
            runs = [run for run in box.runs("retrain/retrain-nightly") if run["id"] not in before]
            return [run for run in runs if run["state_type"] == kind]

        second = until(lambda: new("CANCELLED"))[0]
        assert "concurrency limit" in box.state(second["id"])["message"]
        (first,) = new("RUNNING")
        assert first["auto_scheduled"]
        on_drift = box.ended(box.run("retrain/retrain-on-drift"))  # another deployment, so another limit
        assert on_drift["type"] == "CANCELLED"
        assert re.fullmatch("another run of retrain works in .*project; nothing was done", on_drift["message"])
    finally:
        box.ask("DELETE", f"{path}/{schedule['id']}")
    box.release()
    assert box.ended(first["id"])["name"] == "Promoted"
    assert box.versions == ["v1"]


@one
def test_a_run_outlives_its_pretraining_its_worker_and_its_server(box):
    box.reset(hold=True)
    run = box.run()
    box.pretraining(0).kill()
    box.pretraining(1)  # the same run tries again
    box.kill(box.worker)
    box.kill(box.server)
    box.release()
    until(lambda: (box.project / "out/pretrain").exists())
    box.start_server()
    box.start_worker()
    assert box.ended(run)["name"] == "Promoted"
    assert box.versions == ["v1"]


@one
def test_a_cancelled_run_leaves_no_process(box):
    box.reset(hold=True)
    run = box.run()
    engine, started = box.flow()
    assert len(started) >= 3  # the guard, dvc and the stage
    box.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    assert gone([engine, *started])
    assert box.ended(run)["type"] == "CANCELLED"
    assert box.versions == []


@one
def test_a_killed_flow_has_crashed(box):
    box.reset(hold=True)
    run = box.run()
    engine, started = box.flow()
    engine.kill()
    assert gone([engine, *started])
    assert box.ended(run)["type"] == "CRASHED"
    assert box.versions == []


@one
def test_no_run_is_running_for_ever_and_the_next_is_fine(box):
    """With worker and flow killed, only the server can tell, by the missing heartbeats."""
    box.reset(hold=True)
    crash = "import asyncio; from flows import automations as a; a.MISSED = 10; asyncio.run(a.zombies().acreate())"
    box.command("python", "-c", crash)  # removed below: heartbeats come every 30 s, so it crashes healthy runs
    try:
        run = box.run()
        engine, started = box.flow()
        box.worker.kill()
        engine.kill()
        box.worker.wait()
        assert gone([engine, *started])
        state = box.ended(run)
        assert (state["type"], state["message"]) == (
            "CRASHED",
            "no heartbeat for 10 s: its process and its worker are gone",
        )
    finally:
        for automation in box.ask("POST", "/automations/filter"):
            if automation["name"] == "a run without heartbeats has crashed":
                box.ask("DELETE", f"/automations/{automation['id']}")
        box.start_worker()
    box.release()
    assert box.ended(box.run())["name"] == "Promoted"
    assert box.versions == ["v1"]


@one
def test_a_failure_promotes_nothing_and_a_promotion_has_its_page_and_both_are_told(box):
    told = queue.Queue()

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self):
            told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    def heard(text):  # a message may come twice: the server promises at least one
        return text in told.get(timeout=240)["text"] or heard(text)

    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        box.command("python", "-m", "flows.automations", f"http://127.0.0.1:{server.server_port}/")
        box.reset("bad")
        state = box.ended(box.run())
        reason = (
            "barlow validate: the data failed validation:\ndecodable 0.10, at least 0.99\nphotos/bad.jpg: empty file"
        )
        assert (state["type"], state["message"]) == ("FAILED", reason)
        assert heard("photos/bad.jpg: empty file")
        (box.project / "which.txt").write_text("edges")
        state = box.ended(box.run())
        assert state["message"].endswith("which.txt not committed, so nothing may be promoted; commit or stash it")
        assert heard("which.txt not committed")
        assert box.versions == []
        box.which("edges")
        run = box.run()
        state = box.ended(run)
        assert (state["type"], state["name"]) == ("COMPLETED", "Promoted")
        assert state["message"] == "the first version, and healthy"
        assert heard("encoder.promoted\nthe first version, and healthy")
        server.shutdown()
    assert (box.versions, box.production) == (["v1"], "v1")
    page = box.artifacts(run)
    rows = [(row["stage"], row["result"]) for row in json.loads(page["stages"])]
    assert rows == [("validate", "ran"), ("pretrain", "ran"), ("export", "ran")]
    assert "290 of 294 images accepted, 4 in quarantine" in page["validation"]
    assert page["decision"].startswith("**Promoted**: the first version, and healthy")
    assert "| linear probe |" in page["decision"]


@one
def test_a_worse_encoder_is_refused_and_rollback_restores_the_bytes(box):
    box.reset()
    box.promote("edges")
    onnx = box.project / "models/registry/production/encoder.onnx"
    before = onnx.read_bytes()
    box.command("barlow", "index", "--model", str(onnx))
    box.which("noise")
    refused = box.run()
    state = box.ended(refused)
    assert (state["type"], state["name"]) == ("COMPLETED", "Refused")
    assert "knn: difference to production: -" in state["message"]
    assert "- **failed** knn: difference to production: -" in box.artifacts(refused)["decision"]
    assert (box.versions, onnx.read_bytes()) == (["v1"], before)
    indexes = {path.stem for path in (box.project / "models/index").iterdir()}
    assert indexes == {"space of edges", "space of noise"}  # so search need not pause
    box.promote("other")
    assert onnx.read_bytes() != before
    state = box.ended(box.run("rollback/rollback"))
    assert state["message"] == "rolled back: v1 is in production, v2 is withdrawn"
    assert onnx.read_bytes() == before


@one
def test_drift_starts_one_run_and_then_cools_down(box, tmp_path):
    box.reset()
    box.command("dvc", "repro", "--quiet")
    box.promote("edges")

    def watch(seed, low, high):
        folder = tmp_path / str(seed)
        folder.mkdir()
        rng = np.random.default_rng(seed)
        for i in range(60):
            Image.fromarray(rng.integers(low, high, (28, 28, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        return box.ended(box.run("watch/watch-hourly", recent=str(folder)))

    def started():
        return [
            run for run in box.runs("retrain/retrain-on-drift") if (run["created_by"] or {}).get("type") == "AUTOMATION"
        ]

    before = len(started())
    assert watch(0, 0, 40)["name"] == "Drift"
    until(lambda: len(started()) == before + 1)
    assert watch(1, 0, 40)["name"] == "Drift"
    run = started()[0]["id"]
    state = box.ended(run)
    assert (state["name"], state["message"]) == ("Unchanged", "this very encoder is v1")
    assert {row["result"] for row in json.loads(box.artifacts(run)["stages"])} == {"up to date"}
    assert box.versions == ["v1"]
    assert len(started()) == before + 1
