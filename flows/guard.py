"""`python guard.py GRACE COMMAND...`: run a command; when standard input closes, end it and all its descendants.

The caller holds the other end of the pipe, and the kernel closes it when the caller dies, by whatever signal. Processes
that the command leaves behind become children of the guard (PR_SET_CHILD_SUBREAPER), even in other sessions. The guard
sends them TERM and, after GRACE seconds, KILL. Its exit code is that of the command, or 128 + N if signal N ended it.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

PR_SET_CHILD_SUBREAPER = 36


def main(grace: float, command: list[str]) -> int:
    """Run the command until it ends or standard input closes; return the exit code."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    waking, wake = os.pipe()  # a signal ends the wait, like the end of standard input
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.write(wake, b"."))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # keep the reference: a collected Popen reaps its child
    select.select([sys.stdin, waking, os.pidfd_open(child.pid)], [], [])
    codes = reap()
    if remaining := psutil.Process().children(recursive=True):
        end(remaining, grace, codes)
    child.returncode = codes[child.pid]
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def end(processes: list[psutil.Process], grace: float, codes: dict[int, int]) -> None:
    """Send TERM to all and, after `grace` seconds, KILL to those that remain; add their exit codes by process id."""
    kill_at = time.monotonic() + grace
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    while remaining := psutil.Process().children(recursive=True):
        for process in remaining if time.monotonic() > kill_at else []:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.05)
        codes |= reap()


def reap() -> dict[int, int]:
    """Reap the children that have ended; return their exit codes by process id."""
    codes = {}
    with suppress(ChildProcessError):  # no children at all
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return codes


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
