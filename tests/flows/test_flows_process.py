"""flows/process.py and its guard: they end every process that they started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows import process
from flows.process import Ended, StepFailed

ROOT = Path(__file__).parents[2]
# Writes its process id to a file, prints a line and waits; its child, in a session of its own, does the same.
FAMILY = """
import os, signal, subprocess, sys, pathlib
if sys.argv[1] == "ignore":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "child":
    os.setsid()
else:
    child = subprocess.Popen([sys.executable, "-c", open(sys.argv[2] + "/family.py").read(), "child", sys.argv[2]])
    while not pathlib.Path(sys.argv[2], "child").exists():
        pass
partial = pathlib.Path(sys.argv[2], sys.argv[1] + ".part")
partial.write_text(str(os.getpid()))
partial.rename(pathlib.Path(sys.argv[2], sys.argv[1]))
os.write(1, b"started\\n")  # a print is two writes, which those of two processes may mix
signal.pause()
"""


@pytest.fixture
def family(tmp_path):
    """`family("parent")` is a command that starts two processes; `family.alive(but=...)` returns those left but one."""
    (tmp_path / "family.py").write_text(FAMILY)

    def command(kind):
        return [sys.executable, "-c", FAMILY, kind, str(tmp_path)]

    def alive(but=None):
        names = [path for path in tmp_path.iterdir() if path.name in ("parent", "ignore", "child")]
        assert len(names) == 2
        processes = []
        for path in names:
            try:
                processes += [psutil.Process(int(path.read_text()))] if path.name != but else []
            except psutil.NoSuchProcess:
                continue
        return psutil.wait_procs(processes, timeout=60)[1]

    command.alive = alive
    return command


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(process, "GRACE", 1.0)


def test_lines_come_while_the_command_runs(tmp_path):
    """The command ends only when its first line has been seen."""
    seen, waits = [], f"echo first; while ! test -e {tmp_path}/seen; do :; done; printf 'a\\rb\\n\\033[31mred\\033[0m'"

    def log(line):
        seen.append(line)
        (tmp_path / "seen").touch()

    ended = process.run(["bash", "-c", waits], 60, log)
    assert (ended.code, ended.late) == (0, False)
    assert ended.lines == seen == ["first", "a", "b", "red"]


def test_the_code_and_the_environment_are_the_commands_own():
    assert process.run(["bash", "-c", "exit 7"], 60, print).code == 7
    assert process.run(["bash", "-c", "kill -9 $$"], 60, print).code == 128 + 9
    ended = process.run(["bash", "-c", "command -v dvc; cat"], 60, print)  # nothing on its standard input
    assert ended.lines == [str(Path(sys.executable).with_name("dvc"))]


def test_a_command_at_its_deadline_may_write_a_checkpoint():
    script = "trap 'echo checkpoint; exit 75' TERM; echo ready; while :; do :; done"
    ended = process.run(["bash", "-c", script], 1, print)
    assert ended.late
    assert ended.code == 75
    assert ended.lines == ["ready", "checkpoint"]
    with pytest.raises(StepFailed, match=r"pretrain: stopped at its deadline of 5 minutes") as failed:
        process.require(ended, "pretrain", 300)
    assert not failed.value.passes


def test_a_command_that_ignores_term_is_killed_with_its_children(family):
    ended = process.run(family("ignore"), 1, print)
    assert ended.late
    assert ended.code == 128 + 9
    assert not family.alive()


def test_what_a_command_leaves_behind_is_ended(family):
    command = family("parent")
    script = f'setsid "$@" & while ! test -e {command[-1]}/parent; do :; done'
    leaves = ["bash", "-c", script, "bash", *command]
    ended = process.run(leaves, 60, print)
    assert ended.code == 0
    assert not family.alive()


def test_an_exception_ends_it(family):
    said = []

    def log(line):
        said.append(line)
        if len(said) == 2:  # of the child and of the parent
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.run(family("parent"), 60, log)
    assert not family.alive()


def flow(family, then):
    """Start a process that runs the family, as a flow does, and `then(pid)` once it has started."""
    show = "lambda line: print(line, flush=True)"
    code = f"from flows import process; process.GRACE = 1.0; process.run({family('parent')!r}, 600, {show})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "started\n"
        assert running.stdout.readline() == "started\n"
        then(running.pid)
        running.stdout.read()
    return running.returncode


def test_a_flow_that_is_killed_leaves_nothing(family):
    assert flow(family, lambda pid: os.kill(pid, signal.SIGKILL)) == -signal.SIGKILL
    assert not family.alive()


def test_a_guard_that_is_killed_leaves_nothing_of_its_session(family, tmp_path):
    def kill_guard(pid):
        (guard,) = psutil.Process(pid).children()
        guard.kill()

    assert flow(family, kill_guard) == 0
    assert not family.alive(but="child")
    escaped = psutil.Process(int((tmp_path / "child").read_text()))
    assert escaped.status() != psutil.STATUS_ZOMBIE  # it is in a session of its own, where only the guard would find it
    escaped.kill()


def test_a_term_to_the_guard_is_passed_on(family):
    def term_guard(pid):
        (guard,) = psutil.Process(pid).children()
        guard.terminate()

    flow(family, term_guard)
    assert not family.alive()


DATA = ["barlow validate: the data failed validation:", "decodable 0.1", "a.jpg: empty"]


@pytest.mark.parametrize(
    ("code", "output", "reason", "passes"),
    [
        (255, ["Running stage 'validate':", *DATA, "ERROR: barlow validate, exited with 3"], "\n".join(DATA), False),
        (255, ["barlow pretrain: stopped", "ERROR: pretrain, exited with 75"], "barlow pretrain: stopped", True),
        (255, ["ERROR: pretrain, exited with -9"], "a: exit code 255: pretrain, exited with -9", True),
        (255, ["ERROR: pretrain, exited with 137"], "a: exit code 255: pretrain, exited with 137", True),
        (255, ["ERROR: pretrain, exited with 1"], "a: exit code 255: pretrain, exited with 1", False),
        (2, ["barlow promote: a.py not committed"], "barlow promote: a.py not committed", False),
        (75, ["barlow promote: another process"], "barlow promote: another process", True),
        (255, ["ERROR: Unable to acquire lock."], "a: exit code 255: Unable to acquire lock.", True),
        (
            255,
            ["ERROR: x is busy, it is being blocked by"],
            "a: exit code 255: x is busy, it is being blocked by",
            True,
        ),
        (137, ["half a line"], "a: killed by signal 9: half a line", True),
        (1, [], "a: exit code 1: no output", False),
    ],
)
def test_the_reason_and_whether_it_can_pass(code, output, reason, passes):
    with pytest.raises(StepFailed) as failed:
        process.require(Ended(code, output, 1.0, False), "a", 60)
    assert str(failed.value) == reason
    assert failed.value.passes is passes
