"""Clones of this project that tests run commands in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(project, *command, code=0):
    """Run a command of the virtual environment in the project; return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=project, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def ran(output):
    """Return the stages that DVC says it ran."""
    return re.findall(r"Running stage '(\w+)'", output)


def set_param(project, line, other):
    """Replace a line of params.yaml."""
    path = project / "params.yaml"
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, other))


def commit(project):
    """Commit all that git does not ignore."""
    run(project, "git", "add", "--all")
    run(project, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "test")


def clone(project):
    """Make a clone of what git would commit now, with the smoke preset merged in and committed; return its path.

    Its pretraining writes checkpoints, which the preset's would be too short for.
    """
    for name in filter(None, run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").split("\n")):
        if (ROOT / name).exists() and name != "dvc.lock":
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    run(project, "git", "init", "--quiet")
    run(project, "barlow", "preset", "smoke")
    set_param(project, "checkpoint_steps: null", "checkpoint_steps: 4")
    commit(project)
    return project
