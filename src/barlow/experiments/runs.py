"""DVC experiments: run several at a time, each in a temporary copy of the project, and read their results from git.

All experiments start from one clone of the project, made when the first one starts. There are two reasons. To start an
experiment, DVC briefly checks out other commits and writes other params. And an edit of the project meanwhile would
change the experiments that have not started yet.

Experiments run by `dvc exp run --temp`, not by DVC's own queue. An interrupted queue leaves the training running, and
the next `dvc exp run --run-all` waits forever for the interrupted task (seen with DVC 3.67).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from barlow.core.errors import Interrupted, UserError
from barlow.core.provenance import code_hash, commit, git
from barlow.settings import strict

STAGES = ("pretrain", "extract", "evaluate")
TRIES = 5  # of an experiment that DVC fails to start: another DVC process may hold a lock
SECONDS = 2  # between two tries


def inputs() -> dict[str, Any]:
    """Return what experiments read besides values of params.yaml.

    `code` and `shards` are hashes of code and data; `sections` are the sections of params.yaml that the stages read.

    Raises:
        UserError: dvc.lock, which holds the shards' hash, is not in git, so experiments would not have it.
    """
    if not (commit() and git("ls-files", "dvc.lock")):
        raise UserError("dvc.lock is not in git, and experiments see only files in git; run `git add dvc.lock`")
    stages = strict.read_yaml("dvc.yaml")["stages"]
    sections = {name.partition(".")[0] for stage in STAGES for name in stages[stage].get("params", [])}
    (shards,) = strict.read_yaml("dvc.lock")["stages"]["shard"]["outs"]
    return {"code": code_hash(*STAGES), "sections": sorted(sections), "shards": shards["md5"]}


def require_git() -> None:
    """Raise UserError outside a git repository: DVC keeps experiments as commits."""
    if not commit():
        raise UserError("this folder is not in a git repository with a commit, and DVC keeps experiments as commits")


def dvc(*arguments: str) -> None:
    """Run DVC in the foreground.

    Raises:
        UserError: DVC failed; DVC has printed why.
    """
    if subprocess.run(_dvc(*arguments), env=_environment()).returncode != 0:
        raise UserError(f"`dvc {' '.join(arguments)}` failed; see above")


def barlow(*arguments: str) -> None:
    """Run a command of this package in the foreground; raises UserError if it failed and has printed why."""
    if subprocess.run([sys.executable, "-m", "barlow.cli", *arguments]).returncode != 0:
        raise UserError(f"`barlow {' '.join(arguments)}` failed; see above")


def finished(project: Path | str = ".") -> dict[str, str]:
    """Return the git reference of each finished experiment, by name."""
    references = git("for-each-ref", "refs/exps", "--format=%(refname)", project=project).splitlines()
    return {reference.rpartition("/")[2]: reference for reference in references}


def read(reference: str, path: Path | str) -> Any:
    """Return the content of a JSON file in the commit that a git reference names."""
    return json.loads(git("show", f"{reference}:./{path}"))


def assignment(key: str, value: Any) -> str:
    """Return `key=value` as `dvc exp run --set-param` takes it, floats without an exponent."""
    if isinstance(value, float):
        return f"{key}={Decimal(repr(value)):f}"
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def run(todo: Mapping[str, Mapping[str, Any]], jobs: int) -> Iterator[tuple[str, str | None]]:
    """Run experiments, `jobs` at a time; yield each one's name and why it failed, or None if it did not.

    `todo` holds, by name, the params that each experiment sets, by dotted key.

    Raises:
        Interrupted: SIGINT or SIGTERM came. Running experiments are stopped, finished ones are kept.
        UserError: DVC itself cannot run an experiment.
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
        raise Interrupted("stopped; run again to go on: finished experiments are kept") from None
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def run_missing(todo: Mapping[str, Mapping[str, Any]], jobs: int) -> dict[str, str]:
    """Run the experiments that have no result yet and print progress; return {name: reason} of those that failed."""
    done = finished()
    missing = {name: values for name, values in todo.items() if name not in done}
    print(f"{len(todo)} experiments, {len(missing)} of them to run", flush=True)
    failed, started = dict[str, str](), time.monotonic()
    for ended, (name, reason) in enumerate(run(missing, jobs), 1):
        if reason is not None:
            failed[name] = reason
        left = (time.monotonic() - started) / ended * (len(missing) - ended)
        print(f"{ended}/{len(missing)}  {name}  {reason or 'done'}  {timedelta(seconds=round(left))} left", flush=True)
    return failed


@contextmanager
def _clone() -> Iterator[Path]:
    """Clone the project as it is now, with uncommitted changes and DVC's cache; delete the clone at the end."""
    top, prefix = (git("rev-parse", f"--{what}") for what in ("show-toplevel", "show-prefix"))
    temporary = Path(".dvc/tmp")  # on the project's own disk, in a folder that git ignores
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
        output = process.communicate()[0]
        running.remove(process)
        if name in finished(clone):
            return None
        if "failed to run:" in output or process.returncode < 0:  # a stage failed, not DVC
            return _reason(output)
        stopping.wait(SECONDS)
    raise UserError(f"DVC cannot run experiment {name}: {_reason(output)}")


def _dvc(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill an experiment: DVC, the stage and every process that the stage started. They share a session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _reason(output: str) -> str:
    """Return the last line that a stage printed, or DVC's last line if the stage printed none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    own = [line for line in lines if not line.startswith(("ERROR:", "WARNING:", ">", "Running stage"))]
    return (own or lines)[-1][:300]


def _environment() -> dict[str, str]:
    """Return an environment in which stages run with this Python and with the code in the experiment's copy."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {"PATH": path, "PYTHONPATH": "src", "DVC_NO_ANALYTICS": "1"}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
