"""Versions as git tags, in GTO's format: version 3 is `encoder@v3.0.0`, its way into production `encoder#production#N`.

Each tag is on a commit of its own, a child of HEAD with dvc.lock and the metrics as they are, which no branch sees. So
`git checkout encoder@v3.0.0 && dvc pull` gets what made that version, and nobody's branch moves.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from barlow.core import provenance
from barlow.core.errors import UserError
from barlow.encoder.registry import Version

NAME, STAGE = "encoder", "production"
WRITTEN = ("dvc.lock", "data/", "models/", "reports/")  # by stages; else a change is somebody's
AUTHOR, EMAIL = "barlow", "barlow@localhost"


def require_clean() -> None:
    """Check that settings and code are committed; fine where there is no git repository.

    Raises:
        UserError: they are not.
    """
    if not provenance.commit():
        return
    changed = provenance.git("diff", "--name-only", "--relative", "HEAD").splitlines()
    new = provenance.git("ls-files", "--others", "--exclude-standard", "--", "src", "flows").splitlines()
    if mine := [name for name in [*changed, *new] if not name.startswith(WRITTEN)]:
        raise UserError(f"{', '.join(mine[:5])} not committed, so nothing may be promoted; commit or stash it")


def tag(version: Version) -> str:
    """Tag a version as being in production, where that is not so already; return what was done.

    Harmless to repeat: a promotion that was killed before it tagged is tagged by the next one.
    """
    if not provenance.commit():
        return "no git repository, so no tag"
    from gto import api  # takes a second, and only a promotion needs it

    number = f"v{version.number}.0.0"
    words: dict[str, Any] = {"message": f"registry {version.name}", "author": AUTHOR, "author_email": EMAIL}
    try:
        if f"{NAME}@{number}" not in provenance.git("tag", "--list", f"{NAME}@*").split():
            api.register(".", NAME, _snapshot(version), version=number, **words)
        assigned = provenance.git("tag", "--list", "--sort=-version:refname", f"{NAME}#{STAGE}#*").split()[:1]
        commits = [provenance.git("rev-parse", f"{name}^{{commit}}") for name in (f"{NAME}@{number}", *assigned)]
        if commits[1:] != commits[:1]:
            api.assign(".", NAME, STAGE, version=number, force=True, **words)
    except Exception as error:  # gto raises its own, its libraries', and git's; the registry is right all the same
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        return f"the promotion holds, but not its git tag ({str(reason).strip()}); promote again to retry"
    return f"git tags {NAME}@{number} and {NAME}#{STAGE}"


def _snapshot(version: Version) -> str:
    """Commit the tracked files as they are, on no branch; return the commit."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        provenance.git("read-tree", "HEAD", environment=index)
        provenance.git("add", "--update", "--", ".", environment=index)
        tree = provenance.git("write-tree", environment=index)
    who = ["-c", f"user.name={AUTHOR}", "-c", f"user.email={EMAIL}"]
    return provenance.git(*who, "commit-tree", tree, "-p", "HEAD", "-m", f"encoder {version.name}")
