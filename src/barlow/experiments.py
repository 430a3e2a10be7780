"""DVC experiments: run some at a time, each in a temporary copy of the project, and read what they wrote from git.

`dvc exp run --temp`, and not DVC's own queue: interrupted, that leaves the training running and a task which the next
`dvc exp run --run-all` waits for without end (seen with DVC 3.67).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from types import FrameType
from typing import Any

from barlow import files, strict
from barlow.errors import Interrupted, UserError

STAGES = ("pretrain", "extract", "evaluate")
TRIES = 5  # where DVC itself fails: another of its processes may hold a lock
SECONDS = 2  # between two of them
GRACE = 60  # seconds from SIGINT to SIGKILL


def inputs() -> dict[str, Any]:
    """Return what the experiments read besides values of params.yaml: hashes of code and data, and the sections.

    Raises:
        UserError: dvc.lock, which says what the shards are, is not in git: experiments would not have it.
    """
    if subprocess.run(["git", "ls-files", "--error-unmatch", "dvc.lock"], capture_output=True).returncode != 0:
        raise UserError("dvc.lock is not in git, and experiments see only what is: git add dvc.lock")
    stages = strict.read_yaml("dvc.yaml")["stages"]
    code = {dep for stage in STAGES for dep in stages[stage]["deps"] if dep.startswith("src/")}
    sections = {name.partition(".")[0] for stage in STAGES for name in stages[stage].get("params", [])}
    (shards,) = strict.read_yaml("dvc.lock")["stages"]["shard"]["outs"]
    return {
        "code": {path: files.sha256(path) for path in sorted(code)},
        "sections": sorted(sections),
        "shards": shards["md5"],
    }


def dvc(*arguments: str) -> None:
    """Run DVC in the foreground.

    Raises:
        UserError: it failed; it has said why.
    """
    if subprocess.run([sys.executable, "-m", "dvc", *arguments], env=_environment()).returncode != 0:
        raise UserError(f"`dvc {' '.join(arguments)}` failed; see above")


def finished() -> dict[str, str]:
    """Return the commits of all experiments there are, by name."""
    listed = git("for-each-ref", "refs/exps", "--format=%(refname) %(objectname)")
    rows = (line.split() for line in listed.splitlines())
    return {ref.rpartition("/")[2]: commit for ref, commit in rows}


def read(commit: str, path: Path | str) -> Any:
    """Return a JSON file of a commit."""
    return json.loads(git("show", f"{commit}:./{path}"))


def assignment(key: str, value: Any) -> str:
    """Return what `dvc exp run --set-param` takes."""
    if isinstance(value, float):
        return f"{key}={Decimal(repr(value)):f}"
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def run(todo: Mapping[str, Mapping[str, Any]], jobs: int) -> Iterator[tuple[str, str | None]]:
    """Run experiments, `jobs` at a time, each with the params that it sets; yield (name, why it failed or None).

    Raises:
        Interrupted: SIGINT or SIGTERM came; what ran was stopped, and what has ended is kept.
    """
    running, stopping = set[subprocess.Popen[str]](), threading.Event()
    handlers = {kind: signal.signal(kind, _interrupt) for kind in (signal.SIGINT, signal.SIGTERM)}
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(_run, name, values, running, stopping): name for name, values in todo.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except KeyboardInterrupt:
        raise Interrupted("stopped; run again to go on: experiments that have ended are not run again") from None
    finally:
        stopping.set()
        for process in list(running):
            _kill(process)
        pool.shutdown(cancel_futures=True)
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def _run(
    name: str, values: Mapping[str, Any], running: set[subprocess.Popen[str]], stopping: threading.Event
) -> str | None:
    options = [option for key, value in values.items() for option in ("--set-param", assignment(key, value))]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--single-item", "--name", name, *options, *STAGES]
    for _ in range(TRIES):
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, env=_environment(), start_new_session=True, **pipes)
        running.add(process)
        if stopping.is_set():
            _kill(process)
        said = process.communicate()[0]
        running.remove(process)
        if name in finished():
            return None
        if "failed to run:" in said or process.returncode < 0:  # a stage, not DVC
            return _reason(said)
        stopping.wait(SECONDS)
    raise UserError(f"DVC cannot run experiment {name}: {_reason(said)}")


def _kill(process: subprocess.Popen[str]) -> None:
    """End an experiment, which has a session of its own: DVC, the stage and all that it started.

    At its start and its end DVC holds the project on another commit with other params; asked to stop, it undoes that.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _reason(said: str) -> str:
    """Return the last line that a stage said, else DVC's."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    own = [line for line in lines if not line.startswith(("ERROR:", "WARNING:", ">", "Running stage"))]
    return (own or lines)[-1][:300]


def _environment() -> dict[str, str]:
    """Return an environment in which stages are those of this Python, and their code that of the experiment's copy."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {"PATH": path, "PYTHONPATH": "src", "DVC_NO_ANALYTICS": "1"}


def git(*arguments: str) -> str:
    """Run git in this folder and return what it prints; raises CalledProcessError where it fails."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
