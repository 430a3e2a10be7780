import hashlib
import os
import shutil
import signal
import subprocess
import sys

import pytest

from barlow.core import files
from barlow.core.errors import Interrupted, UserError
from barlow.encoder import registry
from barlow.encoder.registry import Registry


def add(held, content, replaces=None):
    sha256 = hashlib.sha256(content).hexdigest()
    return held.add({"encoder.onnx": content, "README.md": "a card"}, {"sha256": sha256, "replaces": replaces})


@pytest.fixture
def held(tmp_path):
    held = Registry(tmp_path / "registry")
    with held.locked():
        yield held


def test_versions_count_up_and_the_pointer_is_a_relative_link(held):
    assert held.production() is None
    versions = [add(held, bytes([i])) for i in range(11)]
    assert [version.name for version in held.versions()] == [f"v{i}" for i in range(1, 12)]  # not v1, v10, v11, v2
    held.point(versions[10])
    assert held.production() == versions[10]
    assert str((held.folder / "production").readlink()) == "versions/v11"
    held.folder.rename(held.folder.with_name("moved"))
    assert (held.folder.with_name("moved") / "production/encoder.onnx").read_bytes() == bytes([10])


def test_a_version_is_read_only_and_tells_when_it_was_changed(held):
    version = add(held, b"whole")
    assert version.damage() is None
    assert all(path.stat().st_mode & 0o222 == 0 for path in version.path.iterdir())
    version.onnx.chmod(0o644)
    version.onnx.write_bytes(b"other")
    assert "another SHA-256" in version.damage()
    (version.path / "card.json").unlink()
    assert "cannot be read" in version.damage()


def test_a_version_is_found_by_its_content_unless_damaged(held):
    first, second = add(held, b"a"), add(held, b"b")
    assert held.find(files.sha256(second.onnx)) == second
    assert held.find("0") is None
    sha256 = files.sha256(first.onnx)
    first.onnx.unlink()
    assert held.find(sha256) is None


def test_before_follows_what_was_replaced_past_what_is_damaged_or_withdrawn(held):
    first = add(held, b"1")
    second = add(held, b"2", "v1")
    third = add(held, b"3", "v2")
    fourth = add(held, b"4", "v2")  # after a rollback from v3 to v2
    assert held.before(fourth) == second
    assert held.before(third) == second
    assert held.before(first) is None
    held.withdraw(second, instead=first)
    assert held.before(fourth) == first
    held.withdraw(None, instead=second)
    assert held.withdrawn() == {}
    second.onnx.unlink()
    assert held.before(fourth) == first
    (fourth.path / "card.json").unlink()  # go by the numbers
    assert held.before(fourth) == third


def test_a_pointer_to_nothing_is_named(held):
    version = add(held, b"1")
    held.point(version)
    version.path.rename(held.folder / "lost")
    with pytest.raises(
        UserError, match=r"no version v1; it has: none, and it is in production; `barlow rollback VERSION`"
    ):
        held.production()


def test_only_one_process_changes_it(held):
    with pytest.raises(Interrupted, match="another process is promoting"), Registry(held.folder).locked():
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"promote\.registry=.*file/registry cannot be written"),
        Registry(tmp_path / "file/registry").locked(),
    ):
        pass


def test_each_kind_has_versions_of_its_own_and_one_lock(held):
    other = Registry(held.folder, "classifier")
    with pytest.raises(Interrupted, match="another process is promoting"), other.locked():
        pass
    encoder = add(held, b"encoder")
    content = {"classifier.onnx": b"classifier"}
    version = other.add(content, {"sha256": hashlib.sha256(b"classifier").hexdigest()})
    held.point(encoder)
    other.point(version)
    assert (encoder.kind, version.kind) == ("encoder", "classifier")
    assert (held.versions(), other.versions()) == ([encoder], [version])
    assert (held.folder / "classifier/production/classifier.onnx").read_bytes() == b"classifier"
    assert version.damage() is None
    version.onnx.unlink()
    assert "cannot be read" in version.damage()


@pytest.mark.parametrize("content", ["", "{", "[]", '""'])
def test_a_damaged_list_of_withdrawn_versions_is_named(tmp_path, content):
    (tmp_path / "withdrawn.json").write_text(content)
    with pytest.raises(UserError, match=r"withdrawn\.json is damaged; repair it, or delete it"):
        Registry(tmp_path).withdrawn()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_changes_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this sandbox mounts nothing")
    try:
        small = Registry(disk / "registry")
        with small.locked():
            version = add(small, b"fits")
            small.point(version)
            with pytest.raises(UserError, match=r"no space for v2, 100,006 bytes; production is as it was"):
                add(small, bytes(100_000))
            assert small.production() == version
            assert small.versions() == [version]
            assert not list(disk.glob("registry/versions/.*"))
    finally:
        subprocess.run(["umount", disk], check=True)


KILLED = """
import os, signal, sys
from barlow.encoder.registry import Registry
left = int(sys.argv[2])
def watch(event, arguments):  # whatever touches the disk
    global left
    if event in ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.chmod", "shutil.copyfile"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
registry = Registry(sys.argv[1])
sys.addaudithook(watch)
with registry.locked():
    import hashlib
    version = registry.find(hashlib.sha256(b"new").hexdigest())
    version = version or registry.add(
        {"encoder.onnx": b"new", "README.md": "x"}, {"sha256": hashlib.sha256(b"new").hexdigest(), "replaces": "v1"})
    registry.point(version)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_in_production(tmp_path):
    old = Registry(tmp_path / "registry")
    with old.locked():
        old.point(add(old, b"old"))
    killed, seen = 0, []
    while True:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(old.folder), str(killed)], capture_output=True, text=True
        )
        version = old.production()
        assert version.damage() is None
        seen.append(version.onnx.read_bytes())
        assert len(old.versions()) <= 2  # the next run uses the version that a killed run added
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        killed += 1
        if seen[-1] == b"new":  # back to the beginning, to be killed later
            for version in old.versions()[1:]:
                shutil.rmtree(version.path)
            old.point(old.versions()[0])
        assert killed < 100
    assert killed > 12
    assert seen[0] == b"old"
    assert seen[-1] == b"new"
    assert not list(old.folder.glob("**/.*tmp"))


def test_the_log_keeps_every_entry(held):
    for i in range(3):
        held.log("promoted", {"i": i})
    entries = sorted(held.folder.glob("log/*-promoted.json"))
    assert [files.read_json(entry)["i"] for entry in entries] == [0, 1, 2]
    assert registry.now().endswith("+00:00")
