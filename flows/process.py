"""Commands as steps of a flow: live lines, a deadline, no orphans, and which failures can pass later."""

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
KEPT = 400  # last lines
POLL = 0.5  # seconds

# What another try may find gone. DVC exits with 255 whatever a stage exits with, so its words decide.
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

    code: int  # 128 + N: by signal N
    lines: list[str]  # the last of its output
    seconds: float
    late: bool  # it was ended at its deadline

    @property
    def killed(self) -> bool:
        """Whether a signal ended it; DVC's own 255 is none."""
        return 128 < self.code <= 128 + signal.NSIG


class StepFailed(Exception):
    """A command failed; the message is its reason, as a person would want to read it."""

    def __init__(self, reason: str, passes: bool) -> None:
        super().__init__(reason)
        self.passes = passes  # another try may succeed


def run(command: Sequence[str], deadline: float, log: Callable[[str], None]) -> Ended:
    """Run a command of this environment in a session of its own, and hand each line of its output to `log` at once.

    However this ends, by `deadline` (seconds), an exception or a signal, nothing of the command stays behind.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    attempts = {"AWS_MAX_ATTEMPTS": "2"}  # of one request to a bucket; with boto's 5 a dead network takes minutes
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
            os.killpg(process.pid, signal.SIGKILL)  # the guard hangs, or was killed and its command has nobody
        process.wait()
        process.stdout.close()
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return Ended(code, list(lines), time.monotonic() - started, late)


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield lines as they come, without colours, and an empty text twice a second; ends with the process."""
    assert process.stdout
    os.set_blocking(process.stdout.fileno(), False)
    rest, polled = b"", time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            over = process.poll() is not None  # before reading: what it wrote last is still read
            selector.select(0 if over else POLL)
            chunk = process.stdout.read(1 << 16)
            *whole, rest = re.split(rb"[\r\n]+", rest + (chunk or b""))
            for line in [*whole, rest] if over and not chunk else whole:
                if text := re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.decode(errors="replace")).rstrip():
                    yield text
            if over and not chunk:
                return
            if chunk == b"":  # it closed its output and goes on
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
            if time.monotonic() - polled > POLL:
                polled = time.monotonic()
                yield ""


def require(ended: Ended, name: str, deadline: float) -> Ended:
    """Check that a command ended well.

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
    """Return what a person needs of the output: the stage's own words, else DVC's, else the end of it."""
    said = [i for i, line in enumerate(ended.lines) if re.match(r"barlow \w+: ", line)]
    errors = [line.removeprefix("ERROR: ") for line in ended.lines if line.startswith("ERROR: ")]
    if said:
        own = [line for line in ended.lines[said[-1] :] if not line.startswith("ERROR: ")]
        return "\n".join(own[:30])
    how = f"killed by signal {ended.code - 128}" if ended.killed else f"exit code {ended.code}"
    return f"{name}: {how}: " + ("; ".join(errors) or "\n".join(ended.lines[-5:]) or "no output")
