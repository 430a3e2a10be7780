"""Where an encoder and a page about it come from: git revision, hashes, versions, hardware."""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import onnx

from barlow.core import files, machine
from barlow.training import model

PACKAGE = Path(__file__).parents[1]


def facts() -> dict[str, dict[str, str]]:
    """Return what is known of the encoder, of its ONNX file and of the page that is being written."""
    exported = onnx.load(str(files.ONNX), load_external_data=False).metadata_props
    trained, pretrained = model.load_metadata(files.ENCODER), files.read_json(files.REPORTS / "pretrain.json")
    return {
        "Encoder": {
            "training images, SHA-256": str(trained.get("data", "unknown")),
            **{f"training: {name}": str(trained[name]) for name in ("version", "steps") if name in trained},
            **{f"training: {name}": str(pretrained[name]) for name in ("hardware", "processes") if name in pretrained},
            f"{files.ENCODER}, SHA-256": files.sha256(files.ENCODER),
        },
        str(files.ONNX): {
            "SHA-256": files.sha256(files.ONNX),
            **{p.key.replace("_", " "): p.value for p in exported if p.key != "classes"},
        },
        "This page": {
            "git revision": revision(),
            "hardware": machine.hardware(),
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        },
    }


def revision(paths: Iterable[str] = ("src", "params.yaml")) -> str:
    """Return the project's git revision, and which of some files and folders differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = [path for path in paths if git("status", "--porcelain", "--", path)]
        return f"{commit}, with uncommitted changes in {', '.join(changed)}" if changed else commit
    except (OSError, subprocess.CalledProcessError):
        return "not in a git repository"


def code_hash(*commands: str) -> str:
    """Hash the modules of commands and all that they import of this package, directly or not.

    The schema in `settings` is left out: what it describes are values, which whoever asks hashes as well.
    """
    todo, sources = {PACKAGE / f"{command}.py" for command in commands}, dict[str, bytes]()
    while todo:
        path = todo.pop()
        sources[path.relative_to(PACKAGE).as_posix()] = path.read_bytes()
        todo |= {found for found in imported(path) if found.relative_to(PACKAGE).as_posix() not in sources}
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(name.encode() + source)
    return digest.hexdigest()


def imported(path: Path) -> Iterator[Path]:
    """Yield the modules of this package, but for those of `settings`, that a module imports by `from ... import`."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            top, *inner = node.module.split(".")
            if top == "barlow" and inner[:1] != ["settings"]:
                folder = PACKAGE.joinpath(*inner)
                modules = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
                yield from (module for module in modules if module.exists())


def packages() -> dict[str, str]:
    """Return the versions of what the pipeline runs on, as far as it is installed."""
    required = [r for r in metadata.requires("barlow") or [] if "extra ==" not in r or 'extra == "train"' in r]
    found = {}
    for name in ["barlow", *sorted({re.split(r"[^\w.-]", requirement)[0] for requirement in required})]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
