"""Where a result comes from: git revision, hash of the code, versions of packages, hardware."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from barlow.core import files

PACKAGE = Path(__file__).parents[1]


def git(*arguments: str, project: Path | str = ".", environment: Mapping[str, str] | None = None) -> str:
    """Run git in the folder `project` and return its output without the last line end; raises CalledProcessError."""
    done = subprocess.run(
        ["git", *arguments],
        cwd=project,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.rstrip("\n")


def commit() -> str | None:
    """Return the commit that is checked out; None outside a git repository or if git is not installed."""
    try:
        return git("rev-parse", "--verify", "--quiet", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def revision(paths: Iterable[str] = ("src", "params.yaml")) -> str:
    """Return the commit that is checked out and, if any, those of `paths` (files or folders) that differ from it."""
    if not (head := commit()):
        return "not in a git repository"
    changed = [path for path in paths if git("status", "--porcelain", "--", path)]
    return f"{head}, with uncommitted changes in {', '.join(changed)}" if changed else head


def code_hash(*commands: str) -> str:
    """Hash the modules of commands and every module of this package that they import, directly or not.

    `settings` is left out: it is only the schema of params.yaml, and callers hash the values themselves.
    """
    todo, sources = {PACKAGE / f"{command}.py" for command in commands}, dict[str, bytes]()
    while todo:
        path = todo.pop()
        sources[path.relative_to(PACKAGE).as_posix()] = path.read_bytes()
        todo |= {module for module in imported(path) if module.relative_to(PACKAGE).as_posix() not in sources}
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(name.encode() + source)
    return digest.hexdigest()


def imported(path: Path) -> Iterator[Path]:
    """Yield the modules of this package that a module imports by `from ... import`, except those of `settings`."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            top, *inner = node.module.split(".")
            if top == "barlow" and inner[:1] != ["settings"]:
                folder = PACKAGE.joinpath(*inner)
                modules = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
                yield from (module for module in modules if module.exists())


def packages() -> dict[str, str]:
    """Return the versions of this package and of those that it needs for training, as far as they are installed."""
    required = [r for r in metadata.requires("barlow") or [] if "extra ==" not in r or 'extra == "train"' in r]
    versions = {}
    for name in ["barlow", *sorted({re.split(r"[^\w.-]", requirement)[0] for requirement in required})]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> str:
    """Name the processors that this process may use, and all GPUs: `2 x AMD EPYC 9R14, 8 x NVIDIA H100`."""
    import torch  # here: a benchmark may have to import another package first

    described = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", described.read_text()) if described.exists() else None
    gpus = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    processors = {model[1] if model else platform.machine(): files.cpus()}
    return ", ".join(f"{count} x {name}" for name, count in [*processors.items(), *gpus.items()])
