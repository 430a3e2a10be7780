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
from contextlib import suppress

import psutil

PR_SET_CHILD_SUBREAPER = 36


def main(grace: float, command: list[str]) -> int:
    """Run the command to its end, or to that of standard input."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    waking, wake = os.pipe()  # a signal wakes the loop as the end of standard input does
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.write(wake, b"."))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    ended = os.pidfd_open(child.pid)
    ready, _, _ = select.select([sys.stdin, waking, ended], [], [])
    if ended not in ready:
        end(psutil.Process().children(recursive=True), grace)
    code = child.wait()
    end(psutil.Process().children(recursive=True), grace)
    return code if code >= 0 else 128 - code


def end(processes: list[psutil.Process], grace: float) -> None:
    """Send TERM to all and, to those that are still there after `grace` seconds and to their children, KILL."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(processes, grace)
    while left := psutil.Process().children(recursive=True):  # psutil.wait_procs reaps those that are its own
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, 1)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
