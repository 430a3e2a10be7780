"""The flow `retrain`: pull, one task a DVC stage, promote, push. DVC decides what is stale, the gate what is good.

Everything that is computed is computed by the commands that a person would type; this adds time, retries, observation
and what to say afterwards. Ends as Promoted, Unchanged or Refused (all three completed), Failed with the reason as its
message, or Cancelled where another run works in the same folder.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Iterator
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
    """Another run works in this folder."""


def may_pass(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Say whether another try is worth it: not for wrong settings or failed data."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StepFailed) and error.passes


@task(persist_result=False, task_run_name="{name}")
def step(name: str, command: list[str], minutes: float, fine: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run one command; return what it said and how long it took."""
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
        minutes: deadlines of steps by name, in minutes; `default` is for those that are not named.
        retries: further tries of a step whose failure can pass: locks, remote storage, interruption, a killed child.
        retry_seconds: before the first of them; doubled each time, with jitter.
        push: push data and models to the DVC remote, where there is one.
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
                do("check", "barlow", "promote", "--check")  # before hours of work: could it be promoted at all?
                remote = has_remote()
                if remote and (tracked := tracked_data()):
                    do("pull", "dvc", "pull", *tracked)
                do("scan", "barlow", "scan")
                for stage in yaml.safe_load(Path("dvc.yaml").read_text())["stages"]:
                    # The first looks at the source itself. Others take what is missing here from the remote; without
                    # `--allow-missing`, what is nowhere is made again.
                    pull = ["--pull"] if remote and rows else []
                    rows.append(pages.row(do(stage, "dvc", "repro", "--single-item", *pull, stage)))
                if any(files.INDEX.glob("*.npz")):  # a service searches: it shall not pause at the promotion
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
    """Say whether a default DVC remote is set up, in any of the files where DVC looks."""
    asked = subprocess.run([sys.executable, "-m", "dvc", "config", "core.remote"], capture_output=True)
    return asked.stdout.strip() != b""


def tracked_data() -> list[str]:
    """Return what `dvc add` tracks: data that no stage makes."""
    return provenance.git("ls-files", "*.dvc").splitlines() if provenance.commit() else []


@contextmanager
def alone() -> Iterator[None]:
    """Hold the folder, a project's; the lock goes with the process, however it ends.

    Raises:
        Busy: another run has it.
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
    """Put what happened on the run's page."""
    create_table_artifact(key="stages", table=rows, description="what DVC ran, and what it found up to date")
    for key, text in {
        "validation": pages.validation(),
        "decision": pages.decision(decision),
        "report": pages.report(),
    }.items():
        if text:
            create_markdown_artifact(key=key, markdown=text)


def announce(event: str, payload: dict[str, Any]) -> None:
    """Emit an event about the encoder of `payload["space"]`, for automations: notifications, deployments."""
    resource = {"prefect.resource.id": f"barlow.encoder.{payload['space']}", "prefect.resource.name": "encoder"}
    emit_event(event, resource=resource, payload=payload)


if __name__ == "__main__":
    retrain()
