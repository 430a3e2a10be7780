"""Commands as steps of a flow: live output, a deadline, no orphans, and which failures another try may fix."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

GRACE = 20.0  # seconds between TERM and KILL: pretraining finishes its step and writes a checkpoint
KEPT = 400  # last lines of output that are kept
POLL = 0.5  # seconds between looks at the process

# Failures that another try may not meet. DVC exits with 255 whatever the stage's exit code, so the output decides.
PASSES = re.compile(
    r"exited with (75|-\d+|13[0-9]|14[0-9])\b"  # interrupted after a checkpoint; killed
    r"|Unable to acquire lock|is busy, it is being blocked by|database is locked"
    r"|another process is promoting"
    r"|Could not connect to the endpoint URL: |(?:Connect|Read) timeout on endpoint URL: |Connection was closed before"
    r"|Response payload is not completed|\(reached max retries: \d+\)",  # remote storage
    re.IGNORECASE,
)


class Ended(NamedTuple):
    """How a command ended."""

    code: int  # 128 + N if signal N ended it
    lines: list[str]  # the last KEPT lines of its output
    seconds: float
    late: bool  # it was ended at its deadline

    @property
    def killed(self) -> bool:
        """Whether a signal ended it; 255, by which DVC reports any failure, is no signal."""
        return 128 < self.code <= 128 + signal.NSIG


class StepFailed(Exception):
    """A command failed; the message is the reason, for people to read."""

    def __init__(self, reason: str, passes: bool) -> None:
        super().__init__(reason)
        self.passes = passes  # another try may succeed


def run(command: Sequence[str], deadline: float, log: Callable[[str], None]) -> Ended:
    """Run a command of this environment in a session of its own, and pass each line of its output to `log` at once.

    After `deadline` seconds the command is ended. However this function ends, no process of the command remains.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    attempts = {
        "AWS_MAX_ATTEMPTS": "2"
    }  # per request to a bucket; with boto's default of 5, a dead network takes minutes
    environment = attempts | os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}
    guard = [sys.executable, str(Path(__file__).with_name("guard.py")), str(GRACE)]
    process = subprocess.Popen(
        [*guard, *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdin
    assert process.stdout
    started, late, lines = time.monotonic(), False, deque[str](maxlen=KEPT)
    try:
        for line in _lines(process):
            if line:
                lines.append(line)
                log(line)
            elif not late and time.monotonic() - started > deadline:
                late = True
                process.stdin.close()
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE + 5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the guard hangs, or was killed and its command runs on
        process.wait()
        process.stdout.close()
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return Ended(code, list(lines), time.monotonic() - started, late)


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield the lines of a process without colours, and an empty string every POLL seconds, until the process ends."""
    assert process.stdout
    os.set_blocking(process.stdout.fileno(), False)
    rest, polled = b"", time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            over = process.poll() is not None  # before reading, so that its last output is still read
            selector.select(0 if over else POLL)
            chunk = process.stdout.read(1 << 16)
            *whole, rest = re.split(rb"[\r\n]+", rest + (chunk or b""))
            for line in [*whole, rest] if over and not chunk else whole:
                if text := re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.decode(errors="replace")).rstrip():
                    yield text
            if over and not chunk:
                return
            if chunk == b"":  # it closed its output and runs on
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
            if time.monotonic() - polled > POLL:
                polled = time.monotonic()
                yield ""


def require(ended: Ended, name: str, deadline: float) -> Ended:
    """Return `ended` if the command succeeded.

    Raises:
        StepFailed: it did not.
    """
    if ended.late:
        raise StepFailed(
            f"{name}: stopped at its deadline of {deadline / 60:g} minutes; raise it, or look at the log", False
        )
    if ended.code == 0:
        return ended
    text = "\n".join(ended.lines)
    passes = bool(PASSES.search(text)) or ended.killed or ended.code == 75
    raise StepFailed(reason(ended, name), passes)


def reason(ended: Ended, name: str) -> str:
    """Return the part of the output that explains the failure: the stage's message, else DVC's, else the last lines."""
    said = [i for i, line in enumerate(ended.lines) if re.match(r"barlow \w+: ", line)]
    errors = [line.removeprefix("ERROR: ") for line in ended.lines if line.startswith("ERROR: ")]
    if said:
        own = [line for line in ended.lines[said[-1] :] if not line.startswith("ERROR: ")]
        return "\n".join(own[:30])
    how = f"killed by signal {ended.code - 128}" if ended.killed else f"exit code {ended.code}"
    return f"{name}: {how}: " + ("; ".join(errors) or "\n".join(ended.lines[-5:]) or "no output")
