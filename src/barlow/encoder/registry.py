"""The registry: immutable versions of the encoder, and which of them is in production.

Classifiers have a registry of their own, the folder `classifier` in that of the encoders: each kind counts its own
versions, and none replaces one of the other kind.

versions/v1/      encoder.onnx or classifier.onnx, card.json, README.md (the card for people), decision.json,
                  reference.npy and, if they are of this encoder, encoder.safetensors (to train on from: backbone,
                  whitening, projector), int8.onnx and fp16.onnx
production        a link to a version, replaced atomically; serve production/encoder.onnx
withdrawn.json    versions that were rolled back; `barlow promote` does not promote these again
log/              one JSON file per decision and per rollback
"""

from __future__ import annotations

import errno
import fcntl
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from barlow.core import files
from barlow.core.errors import Interrupted, UserError


class Version(NamedTuple):
    """A version of the encoder or the classifier; its files never change."""

    path: Path

    @property
    def name(self) -> str:
        """Return the name, such as v3."""
        return self.path.name

    @property
    def number(self) -> int:
        """Return the number, 1 for the first version."""
        return int(self.name[1:])

    @property
    def kind(self) -> str:
        """Return which of `files.KINDS` it is."""
        return next((kind for kind in files.KINDS if (self.path / f"{kind}.onnx").exists()), "encoder")

    @property
    def onnx(self) -> Path:
        """Return the path of the ONNX file."""
        return self.path / f"{self.kind}.onnx"

    @property
    def reference(self) -> Path:
        """Return the path of the embeddings, float32 (n, dim), of a sample of its training images."""
        return self.path / "reference.npy"

    @property
    def card(self) -> dict[str, Any]:
        """Return the card: `sha256` of the ONNX file, `space`, `classes`, `replaces`, `metrics` and more.

        `reduced` and `weights` map the names of files of lower precision and of weights to their SHA-256.
        """
        return files.read_json(self.path / "card.json")  # type: ignore[no-any-return]

    def damage(self) -> str | None:
        """Return the first thing that is wrong with its files, or None."""
        try:
            wanted = {
                self.onnx.name: self.card["sha256"],
                **self.card.get("reduced", {}),
                **self.card.get("weights", {}),
            }
            for name, sha256 in wanted.items():
                if files.sha256(self.path / name) != sha256:
                    return f"{self.path / name} has another SHA-256 than its card says"
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{self.path} cannot be read ({error})"


class Registry:
    """The versions in a folder, which several clones and machines may share. Whoever writes must hold the lock."""

    def __init__(self, folder: Path | str, kind: str = "encoder") -> None:
        self.folder = Path(folder) if kind == "encoder" else Path(folder) / kind
        self._lock = Path(folder) / ".lock"  # of both kinds, which write git tags and models/decision.json
        self._pointer = self.folder / "production"
        self._withdrawn = self.folder / "withdrawn.json"

    def versions(self) -> list[Version]:
        """Return all versions, the oldest first."""
        folders = [path for path in self.folder.glob("versions/v*") if re.fullmatch(r"v\d+", path.name)]
        return sorted(map(Version, folders), key=lambda version: version.number)

    def version(self, name: str) -> Version:
        """Return the version of this name; raises UserError if there is none."""
        for version in self.versions():
            if version.name == name:
                return version
        known = ", ".join(version.name for version in self.versions()) or "none"
        raise UserError(f"{self.folder} has no version {name}; it has: {known}")

    def production(self) -> Version | None:
        """Return the version in production, or None before the first; raises UserError if its folder is gone."""
        if not self._pointer.is_symlink():
            return None
        name = self._pointer.readlink().name
        try:
            return self.version(name)
        except UserError as error:
            raise UserError(
                f"{error}, and it is in production; `barlow rollback VERSION` to one that is there"
            ) from None

    def find(self, sha256: str) -> Version | None:
        """Return the newest intact version whose ONNX file has this SHA-256, or None."""
        for version in reversed(self.versions()):
            with suppress(OSError, ValueError, KeyError):  # a damaged card
                if version.card["sha256"] == sha256 and not version.damage():
                    return version
        return None

    def before(self, version: Version) -> Version | None:
        """Return the version that was in production before `version`, skipping damaged and withdrawn ones, or None."""
        earlier = self.versions()
        while earlier := [known for known in earlier if known.number < version.number]:
            try:
                version = next(known for known in earlier if known.name == version.card["replaces"])
            except (OSError, ValueError, KeyError, StopIteration):  # the card is damaged: go by the numbers
                version = earlier[-1]
            if not version.damage() and version.name not in self.withdrawn():
                return version
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock, so that no other process changes the registry.

        Raises:
            Interrupted: another process holds the lock.
            UserError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self._lock.open("w")
        except OSError as error:
            raise UserError(f"promote.registry={self.folder} cannot be written ({error.strerror})") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Interrupted(f"another process is promoting in {self.folder}; run again when it is done") from None
            yield

    def add(self, contents: Mapping[str, Path | str | bytes], card: Mapping[str, Any]) -> Version:
        """Add the next version, whole or not at all.

        Args:
            contents: the files by name; a Path is copied.
            card: the content of card.json, to which `version` is added.

        Raises:
            UserError: the disk is full.
        """
        folder = self.folder / "versions"
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".*.tmp"):  # left by a process that was killed, since this process holds the lock
            shutil.rmtree(left)
        name = f"v{max([version.number for version in self.versions()], default=0) + 1}"
        temporary = folder / f".{name}.tmp"
        try:
            temporary.mkdir()
            for file, content in contents.items():
                _write(temporary / file, content)
            files.write_json(temporary / "card.json", {**card, "version": name})
            for path in temporary.iterdir():
                path.chmod(0o444)
            files.sync(temporary)
            temporary.rename(folder / name)
            files.sync(folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            needed = sum(_bytes(content) for content in contents.values())
            raise UserError(f"{folder}: no space for {name}, {needed:,} bytes; production is as it was") from None
        return Version(folder / name)

    def point(self, version: Version) -> None:
        """Put a version into production, atomically."""
        temporary = self.folder / ".production.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path("versions") / version.name)
        temporary.replace(self._pointer)
        files.sync(self.folder)

    def withdrawn(self) -> dict[str, str]:
        """Return the time at which each withdrawn version was rolled back."""
        try:
            times: dict[str, str] = files.read_json(self._withdrawn) if self._withdrawn.exists() else {}
            return dict(times.items())
        except (ValueError, AttributeError):
            raise UserError(f"{self._withdrawn} is damaged; repair it, or delete it to withdraw nothing") from None

    def withdraw(self, version: Version | None, instead: Version) -> None:
        """Record that `version` was rolled back, and that `instead` is no longer withdrawn."""
        left = {name: when for name, when in self.withdrawn().items() if name != instead.name}
        files.write_json(self._withdrawn, left | ({version.name: now()} if version else {}))

    def log(self, what: str, entry: Mapping[str, Any]) -> None:
        """Write an entry to the log; `what` ends its file name."""
        files.write_json(self.folder / "log" / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S%fZ}-{what}.json", entry)


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _bytes(content: Path | str | bytes) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _write(path: Path, content: Path | str | bytes) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    files.sync(path)
