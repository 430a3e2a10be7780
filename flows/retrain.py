"""The flow `retrain`: pull, one task per DVC stage, promote, push. DVC decides what is stale, the gate what is good.

The flow runs the commands that a person would type. It adds a schedule, retries, deadlines, logs and notifications. It
ends as Promoted, Unchanged or Refused (all three of type Completed), as Failed with the reason as its message, or as
Cancelled if another run works in the same folder.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.events import emit_event
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import exponential_backoff

from barlow.core import files, provenance
from flows import pages
from flows.process import StepFailed, require, run

REFUSED = 4  # exit code of `barlow promote`


class Busy(Exception):
    """Another run holds the lock of this folder."""


def may_pass(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Tell Prefect whether to retry: not after wrong settings or failed validation, for example."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StepFailed) and error.passes


@task(persist_result=False, task_run_name="{name}")
def step(name: str, command: list[str], minutes: float, fine: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run one command; return its name, seconds and last lines. Exit codes in `fine` are no failure."""
    log: Any = get_run_logger()
    ended = run(command, 60 * minutes, log.info)
    if ended.code not in fine:
        require(ended, name, 60 * minutes)
    return {"name": name, "seconds": round(ended.seconds, 1), "lines": ended.lines}


@flow(name="retrain", persist_result=False)
def retrain(
    minutes: dict[str, float] | None = None, retries: int = 3, retry_seconds: float = 30, push: bool = True
) -> State[Any]:
    """Bring the pipeline up to date, and production if the gate agrees.

    Args:
        minutes: deadlines by the name of the step; `default` is for all other steps.
        retries: of a step that failed for a reason that may go away: a lock, remote storage, an interruption, a signal.
        retry_seconds: wait before the first retry; doubled each time, with jitter.
        push: push data and models to the DVC remote, if there is one.
    """
    minutes = {"default": 120.0, "pretrain": 2880.0} | (minutes or {})

    def do(name: str, *command: str, **options: Any) -> dict[str, Any]:
        one = step.with_options(
            name=name,
            retries=retries,
            retry_delay_seconds=exponential_backoff(retry_seconds),
            retry_jitter_factor=0.5,
            retry_condition_fn=may_pass,
        )
        done: dict[str, Any] = one(name, list(command), minutes.get(name, minutes["default"]), **options)
        return done

    rows: list[dict[str, Any]] = []
    decision: dict[str, Any] | None = None
    try:
        with alone():
            try:
                do("check", "barlow", "promote", "--check")  # before hours of work: would a promotion be possible?
                remote = has_remote()
                if remote and (tracked := tracked_data()):
                    do("pull", "dvc", "pull", *tracked)
                do("scan", "barlow", "scan")
                for stage in yaml.safe_load(Path("dvc.yaml").read_text())["stages"]:
                    # The first stage reads the source itself. The others pull missing files from the remote. Without
                    # `--allow-missing`, DVC makes again whatever the remote lacks.
                    pull = ["--pull"] if remote and rows else []
                    rows.append(pages.row(do(stage, "dvc", "repro", "--single-item", *pull, stage)))
                if any(files.INDEX.glob("*.npz")):  # a service searches; with the new index ready, it need not pause
                    do("index", "barlow", "index", "--keep")
                do("promote", "barlow", "promote", fine=(0, REFUSED))
                decision = files.read_json(files.DECISION)
                payload = {key: decision[key] for key in ("production", "champion", "reason", "space", "sha256")}
                announce(f"encoder.{decision['decision']}", payload)
                if remote and push:
                    do("push", "dvc", "push")
            finally:
                publish(rows, decision)
    except Busy as error:
        return Cancelled(message=str(error))
    except StepFailed as error:
        held = f"{decision['production']} is in production, but: " if decision else ""
        return Failed(message=f"{held}{error}")
    return Completed(name=decision["decision"].capitalize(), message=decision["reason"])


def has_remote() -> bool:
    """Tell whether a default DVC remote is configured, in any of the files that DVC reads."""
    name = subprocess.run([sys.executable, "-m", "dvc", "config", "core.remote"], capture_output=True).stdout
    return name.strip() != b""


def tracked_data() -> list[str]:
    """Return the .dvc files in git: data that `dvc add` tracks and no stage makes."""
    return provenance.git("ls-files", "*.dvc").splitlines() if provenance.commit() else []


@contextmanager
def alone() -> Iterator[None]:
    """Hold the lock of the project's folder; the kernel releases it when the process ends.

    Raises:
        Busy: another run holds it.
    """
    folder = Path(".dvc/tmp")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "retrain.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Busy(f"another run of retrain works in {Path.cwd()}; nothing was done") from None
        yield


def publish(rows: list[dict[str, Any]], decision: dict[str, Any] | None) -> None:
    """Put the stages, the outcome of validation, the decision and the report on the run's page.

    A file that cannot be shown is named on the page; it must not decide how the run ends.
    """
    create_table_artifact(
        key="stages", table=rows, description="the stages that DVC ran, and those that were up to date"
    )
    parts: dict[str, Callable[[], str | None]] = {
        "validation": pages.validation,
        "decision": lambda: pages.decision(decision),
        "report": pages.report,
    }
    for key, part in parts.items():
        try:
            text = part()
        except Exception as error:  # a damaged file can make its reader raise anything
            text = f"The {key} cannot be shown: {error}"
        if text:
            create_markdown_artifact(key=key, markdown=text)


def announce(event: str, payload: dict[str, Any]) -> None:
    """Emit an event about the encoder of `payload["space"]`, to which automations react."""
    resource = {"prefect.resource.id": f"barlow.encoder.{payload['space']}", "prefect.resource.name": "encoder"}
    emit_event(event, resource=resource, payload=payload)


if __name__ == "__main__":
    retrain()
