import subprocess
from pathlib import Path

import pytest

from barlow.core.errors import UserError
from barlow.encoder.registry import Version
from barlow.production import tags


def git(*arguments):
    named = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(named, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # no name and address of the machine's user
    git("init", "--quiet")
    for name in ("params.yaml", "dvc.lock", "src/a.py", "reports/evaluate.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("before\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    return tmp_path


def version(number):
    return Version(Path(f"models/registry/versions/v{number}"))


def test_a_version_is_a_commit_with_what_made_it_and_no_branch_moves(repository):
    head = git("rev-parse", "HEAD")
    Path("dvc.lock").write_text("after\n")
    assert tags.tag(version(3)) == "git tags encoder@v3.0.0 and encoder#production"
    assert git("show", "encoder@v3.0.0:dvc.lock") == "after"
    assert git("rev-parse", "encoder@v3.0.0^") == git("rev-parse", "HEAD") == head
    assert git("rev-parse", "encoder#production#1^{commit}") == git("rev-parse", "encoder@v3.0.0^{commit}")
    assert git("status", "--porcelain") == "M dvc.lock"  # neither staged nor committed


def test_tagging_again_does_nothing_and_going_back_assigns_again(repository):
    for number in (1, 1, 2, 2, 1):
        tags.tag(version(number))
    assert git("tag").split() == [
        *("encoder#production#1", "encoder#production#2", "encoder#production#3"),
        *("encoder@v1.0.0", "encoder@v2.0.0"),
    ]
    assert git("rev-parse", "encoder#production#3^{commit}") == git("rev-parse", "encoder@v1.0.0^{commit}")


def test_a_classifier_has_tags_of_its_own(repository):
    path = Path("models/registry/classifier/versions/v1")
    path.mkdir(parents=True)
    (path / "classifier.onnx").touch()
    tags.tag(version(1))
    assert tags.tag(Version(path)) == "git tags classifier@v1.0.0 and classifier#production"
    assert git("tag").split() == [
        "classifier#production#1",
        "classifier@v1.0.0",
        "encoder#production#1",
        "encoder@v1.0.0",
    ]


def test_gto_reads_them(repository):
    from gto import api

    tags.tag(version(1))
    tags.tag(version(2))
    assert api.find_latest_version(".", "encoder").version == "v2.0.0"
    assert {stage.version for stage in api.find_versions_in_stage(".", "encoder", "production")} <= {"v1.0.0", "v2.0.0"}


@pytest.mark.parametrize("name", ["params.yaml", "src/a.py", "src/new.py"])
def test_what_is_not_committed_is_named(repository, name):
    Path(name).write_text("after\n")
    with pytest.raises(UserError, match=rf"{name} not committed, so nothing may be promoted; commit or stash it"):
        tags.require_clean()


@pytest.mark.parametrize("name", ["dvc.lock", "reports/evaluate.json", "notes.txt"])
def test_what_the_stages_write_and_notes_may_be_new(repository, name):
    Path(name).write_text("after\n")
    tags.require_clean()


def test_a_project_below_the_top_of_its_repository(repository, monkeypatch):
    Path("below").mkdir()
    Path("below/params.yaml").write_text("before\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "second")
    monkeypatch.chdir(repository / "below")
    (repository / "params.yaml").write_text("of another project\n")
    tags.require_clean()
    Path("params.yaml").write_text("after\n")
    with pytest.raises(UserError, match=r"params\.yaml not committed"):
        tags.require_clean()


def test_without_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tags.require_clean()
    assert tags.tag(version(1)) == "no git repository, so no tag"


def test_a_tag_that_cannot_be_written_does_not_undo_the_promotion(repository):
    Path(".git/refs/tags/encoder@v1.0.0").mkdir(parents=True)
    Path(".git/refs/tags/encoder@v1.0.0/in the way").write_text("")
    assert tags.tag(version(1)).startswith("the promotion holds, but not its git tag (")
