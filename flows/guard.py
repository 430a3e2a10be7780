"""`python guard.py GRACE COMMAND...`: run a command and, once standard input ends, end it with all it has started.

Whoever starts this holds the other end of the pipe. If that process dies, by whatever signal, the kernel closes it. All
that the command leaves behind is adopted by this process (PR_SET_CHILD_SUBREAPER), in whatever session it runs: TERM
first, and after GRACE seconds KILL. Exits as the command did, and with 128 + N where signal N ended it.
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
    """Run the command to its end, or to that of standard input."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    waking, wake = os.pipe()  # a signal wakes the loop as the end of standard input does
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.write(wake, b"."))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # kept: when forgotten, it takes the exit code with it
    select.select([sys.stdin, waking, os.pidfd_open(child.pid)], [], [])
    codes = reap()
    if left := psutil.Process().children(recursive=True):
        end(left, grace, codes)
    child.returncode = codes[child.pid]
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def end(processes: list[psutil.Process], grace: float, codes: dict[int, int]) -> None:
    """Send TERM to all and, to what is still there after `grace` seconds, KILL; add exit codes by process number."""
    kill_at = time.monotonic() + grace
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    while left := psutil.Process().children(recursive=True):
        for process in left if time.monotonic() > kill_at else []:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.05)
        codes |= reap()


def reap() -> dict[int, int]:
    """Return the exit codes of children that have ended, by number, and let the kernel forget them."""
    codes = {}
    with suppress(ChildProcessError):  # there are none at all
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return codes


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
