"""DVC experiments: run some at a time, each in a temporary copy of the project, and read what they wrote from git.

They start from a clone of the project as it is when the first one starts. To start one, DVC checks out other commits
and writes other params for a moment; and whoever edits the project meanwhile would edit the experiments to come.

`dvc exp run --temp`, and not DVC's own queue: interrupted, that leaves the training running and a task which the next
`dvc exp run --run-all` waits for without end (seen with DVC 3.67).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from barlow.core import files
from barlow.core.errors import Interrupted, UserError
from barlow.core.provenance import commit, git
from barlow.settings import strict

STAGES = ("pretrain", "extract", "evaluate")
TRIES = 5  # where DVC itself fails: another of its processes may hold a lock
SECONDS = 2  # between two of them


def inputs() -> dict[str, Any]:
    """Return what the experiments read besides values of params.yaml: hashes of code and data, and the sections.

    Raises:
        UserError: dvc.lock, which says what the shards are, is not in git: experiments would not have it.
    """
    if not (commit() and git("ls-files", "dvc.lock")):
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
    if subprocess.run(_dvc(*arguments), env=_environment()).returncode != 0:
        raise UserError(f"`dvc {' '.join(arguments)}` failed; see above")


def finished(project: Path | str = ".") -> dict[str, str]:
    """Return the git references of all experiments there are, by name."""
    references = git("for-each-ref", "refs/exps", "--format=%(refname)", project=project).splitlines()
    return {reference.rpartition("/")[2]: reference for reference in references}


def read(reference: str, path: Path | str) -> Any:
    """Return a JSON file of what a git reference names."""
    return json.loads(git("show", f"{reference}:./{path}"))


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
    try:
        with _clone() as clone, ThreadPoolExecutor(jobs) as pool:
            try:
                futures = {pool.submit(_run, *item, clone, running, stopping): item[0] for item in todo.items()}
                for future in as_completed(futures):
                    name, reason = futures[future], future.result()
                    if reason is None:
                        reference = finished(clone)[name]
                        git("push", "--quiet", "origin", f"{reference}:{reference}", project=clone)
                    yield name, reason
            finally:
                stopping.set()
                for process in list(running):
                    _kill(process)
                pool.shutdown(cancel_futures=True)
    except KeyboardInterrupt:
        raise Interrupted("stopped; run again to go on: experiments that have ended are not run again") from None
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


@contextmanager
def _clone() -> Iterator[Path]:
    """Clone the project as it is now, uncommitted changes and DVC's cache included, for as long as it is needed."""
    top, prefix = (git("rev-parse", f"--{what}") for what in ("show-toplevel", "show-prefix"))
    temporary = Path(".dvc/tmp")  # on the disk that the project is on, and in no one's way
    temporary.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="experiments-", dir=temporary, ignore_cleanup_errors=True) as folder:
        git("clone", "--quiet", "--shared", top, folder)
        changes = Path(folder, ".git", "changes.patch").resolve()
        git("diff-index", "--patch", "--binary", f"--output={changes}", "HEAD")
        if changes.stat().st_size:
            git("apply", "--whitespace=nowarn", str(changes), project=folder)
        project = Path(folder, prefix).resolve()
        with suppress(FileNotFoundError):
            shutil.copy(".dvc/config.local", project / ".dvc")
        asked: dict[str, Any] = {"env": _environment(), "capture_output": True, "text": True, "check": True}
        cache = subprocess.run(_dvc("cache", "dir"), **asked).stdout.strip()
        subprocess.run(_dvc("cache", "dir", "--local", cache), cwd=project, **asked)
        yield project


def _run(
    name: str,
    values: Mapping[str, Any],
    clone: Path,
    running: set[subprocess.Popen[str]],
    stopping: threading.Event,
) -> str | None:
    options = [option for key, value in values.items() for option in ("--set-param", assignment(key, value))]
    command = _dvc("exp", "run", "--temp", "--single-item", "--name", name, *options, *STAGES)
    for _ in range(TRIES):
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=clone, env=_environment(), start_new_session=True, **pipes)
        running.add(process)
        if stopping.is_set():
            _kill(process)
        said = process.communicate()[0]
        running.remove(process)
        if name in finished(clone):
            return None
        if "failed to run:" in said or process.returncode < 0:  # a stage, not DVC
            return _reason(said)
        stopping.wait(SECONDS)
    raise UserError(f"DVC cannot run experiment {name}: {_reason(said)}")


def _dvc(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def _kill(process: subprocess.Popen[str]) -> None:
    """End an experiment, which has a session of its own: DVC, the stage and all that it started."""
    with suppress(ProcessLookupError):
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


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
