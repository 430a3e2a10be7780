"""Versions as git tags, in GTO's format: `encoder@v3.0.0` is version 3 of the encoder, `classifier@v3.0.0` the other's.

`encoder#production#N` marks the Nth time that a version was put into production. The tags of a version are on a commit
of its own, which is on no branch: a child of HEAD that also holds the current dvc.lock and metrics. So
`git checkout encoder@v3.0.0 && dvc pull` restores what made that version, and no branch moves.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from barlow.core import provenance
from barlow.core.errors import UserError
from barlow.encoder.registry import Version

STAGE = "production"
WRITTEN = ("dvc.lock", "data/", "models/", "reports/")  # by stages; a change anywhere else was made by a person
AUTHOR, EMAIL = "barlow", "barlow@localhost"


def require_clean() -> None:
    """Check that settings and code are committed, if there is a git repository.

    Raises:
        UserError: they are not; the message names the first files.
    """
    if not provenance.commit():
        return
    changed = provenance.git("diff", "--name-only", "--relative", "HEAD").splitlines()
    new = provenance.git("ls-files", "--others", "--exclude-standard", "--", "src", "flows").splitlines()
    if edited := [name for name in [*changed, *new] if not name.startswith(WRITTEN)]:
        raise UserError(f"{', '.join(edited[:5])} not committed, so nothing may be promoted; commit or stash it")


def tag(version: Version) -> str:
    """Tag a version as being in production, unless it is tagged so already; return a sentence about the outcome.

    It may be repeated: if a promotion is killed before it tags, the next one does.
    """
    if not provenance.commit():
        return "no git repository, so no tag"
    from gto import api  # here: the import takes a second, and only promotions need it

    kind, number = version.kind, f"v{version.number}.0.0"
    options: dict[str, Any] = {"message": f"registry {version.name}", "author": AUTHOR, "author_email": EMAIL}
    try:
        if f"{kind}@{number}" not in provenance.git("tag", "--list", f"{kind}@*").split():
            api.register(".", kind, _snapshot(version), version=number, **options)
        assigned = provenance.git("tag", "--list", "--sort=-version:refname", f"{kind}#{STAGE}#*").split()[:1]
        commits = [provenance.git("rev-parse", f"{name}^{{commit}}") for name in (f"{kind}@{number}", *assigned)]
        if commits[1:] != commits[:1]:
            api.assign(".", kind, STAGE, version=number, force=True, **options)
    except Exception as error:  # of gto, its libraries or git; the registry is right all the same
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        return f"the promotion holds, but not its git tag ({str(reason).strip()}); promote again to retry"
    return f"git tags {kind}@{number} and {kind}#{STAGE}"


def _snapshot(version: Version) -> str:
    """Commit the tracked files as they are, on no branch; return the hash of the commit."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        provenance.git("read-tree", "HEAD", environment=index)
        provenance.git("add", "--update", "--", ".", environment=index)
        tree = provenance.git("write-tree", environment=index)
    author = ["-c", f"user.name={AUTHOR}", "-c", f"user.email={EMAIL}"]
    return provenance.git(*author, "commit-tree", tree, "-p", "HEAD", "-m", f"{version.kind} {version.name}")
