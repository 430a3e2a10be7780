"""`make wheelhouse` and `make setup WHEELHOUSE=` with a lock of a few packages, where no network can be reached."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPACE = "barlow-alone"
UNREACHABLE = "http://192.0.2.1/simple"  # an address for documentation
PART_MB = 10
pytestmark = pytest.mark.soak


def write_wheel(folder, name, version, tag, files):
    """Write a wheel with `files`, {path in it: bytes}, and the metadata that is not among them."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    } | files
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
        for path, content in files.items():
            member = zipfile.ZipInfo(path)
            member.external_attr = 0o100755 << 16  # scripts stay executable
            wheel.writestr(member, content)


def write_wheel_again(folder, name):
    """Write the wheel of an installed package from its files, so that no test asks an index for it."""
    installed = distribution(name)
    (tag, *_) = [line[5:] for line in installed.read_text("WHEEL").splitlines() if line.startswith("Tag: ")]
    files = {}
    for file in installed.files:
        if "bin" in file.parts[:4] and file.parts[0] == "..":
            files[f"{name}-{installed.version}.data/scripts/{file.name}"] = file.read_binary()
        elif file.suffix != ".pyc" and file.name not in ("RECORD", "INSTALLER", "REQUESTED"):
            files[str(file)] = file.read_binary()
    write_wheel(folder, name, installed.version, tag, files)


def write_sdist(folder, name, version):
    """Write a source archive as old as one in the lock is: setup.py, no pyproject.toml."""
    setup = f"from setuptools import setup; setup(name='{name}', version='{version}', py_modules=['{name}'])"
    files = {
        "setup.py": setup,
        f"{name}.py": "",
        "PKG-INFO": f"Metadata-Version: 1.0\nName: {name}\nVersion: {version}\n",
    }
    with tarfile.open(folder / f"{name}-{version}.tar.gz", "w:gz") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(f"{name}-{version}/{path}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


def write_project(folder, packages):
    """Write a project with this one's Makefile and a lock of `packages`, less uv; `older` is for an old 3.x.y."""
    (folder / "src/small").mkdir(parents=True)
    (folder / "src/small/__init__.py").write_text("def main():\n    import plain, sourced\n    print('works')\n")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "small"\nversion = "1"\n[project.scripts]\nsmall = "small:main"\n'
    )
    lock = ""
    for path in sorted(packages.iterdir()):
        name, version = path.name.removesuffix(".tar.gz").split("-")[:2]
        marker = " ; python_full_version < '3.0.1' and sys_platform == 'linux'" if name == "older" else ""
        if name != "uv":
            lock += f"{name}=={version}{marker} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"
    (folder / "requirements.lock").write_text(lock)
    shutil.copy(ROOT / "Makefile", folder)


@pytest.fixture(scope="module")
def make():
    """`make(folder, *arguments, **variables)` runs make in a network namespace without an interface that is up."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip (package iproute2)")
    added = subprocess.run(["ip", "netns", "add", SPACE], capture_output=True, text=True)
    if added.returncode != 0:
        pytest.skip(f"network namespaces are not allowed here: {added.stderr.strip()}")

    def make(folder, *arguments, **variables):
        environment = {name: os.environ[name] for name in ("PATH", "HOME")}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "UV_CACHE_DIR": str(folder / "cache")}
        command = ["ip", "netns", "exec", SPACE, "make", f"PYTHON={sys.executable}", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment | variables, capture_output=True, text=True, timeout=120
        )

    yield make
    subprocess.run(["ip", "netns", "del", SPACE], check=True)


@pytest.fixture(scope="module")
def made(make, tmp_path_factory):
    """A folder with `project`, `packages` (in place of an index), and from make the folders `whole` and `parts`."""
    folder = tmp_path_factory.mktemp("made")
    packages = folder / "packages"
    packages.mkdir()
    try:
        for name in ("uv", "setuptools", "wheel", "packaging"):  # the last three build the source archive
            write_wheel_again(packages, name)
    except PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed here; make setup installs it")
    for name in ("plain", "older"):
        write_wheel(packages, name, "1.0", "py3-none-any", {f"{name}.py": b""})
    write_sdist(packages, "sourced", "1.0")
    write_project(folder / "project", packages)
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(packages)}
    for name, cut in (("whole", []), ("parts", [f"PART_MB={PART_MB}"])):
        done = make(folder / "project", "wheelhouse", f"WHEELHOUSE=../{name}/", *cut, **index)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the project and of both wheelhouses, without the packages from which they were made."""
    for name in ("project", "whole", "parts"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_installs_without_a_network(make, copy, name):
    settings = {"PIP_EXTRA_INDEX_URL": UNREACHABLE, "PIP_FIND_LINKS": UNREACHABLE, "UV_INDEX": UNREACHABLE}
    done = make(copy / "project", "setup", f"WHEELHOUSE=../{name}", **settings)
    assert (done.returncode, done.stderr) == (0, "")  # pip warns where it cannot reach an index, and goes on
    small = subprocess.run([copy / "project/.venv/bin/small"], capture_output=True, text=True)
    assert small.stdout == "works\n", small.stderr
    assert (copy / "project/.venv/installed").exists()
    assert not (copy / "project/.venv/wheels").exists()


def test_parts_have_the_size_and_hold_the_same_files(made):
    whole, parts = ({path.name for path in (made / name).iterdir()} for name in ("whole", "parts"))
    assert whole == {path.name for path in (made / "packages").iterdir()} | {"MADE_FOR", "SHA256SUMS"}
    sizes = [path.stat().st_size for path in sorted((made / "parts").glob("part-*"))]
    assert len(sizes) == len(parts) - 2 >= 3
    assert {*sizes[:-1]} == {PART_MB * 10**6} >= {max(sizes)}
    assert {path.name for path in made.iterdir()} == {"project", "packages", "whole", "parts"}  # nothing temporary


def test_a_missing_part_is_named(make, copy):
    (copy / "parts/part-0001").unlink()
    refused(make, copy, "parts", "../parts/part-0001 is missing: copy it again")


def test_a_damaged_part_is_named(make, copy):
    damage(copy / "parts/part-0002")
    refused(make, copy, "parts", "../parts/part-0002 is damaged: copy it again")


def test_a_damaged_wheel_is_named(make, copy):
    damage(copy / "whole/plain-1.0-py3-none-any.whl")
    refused(make, copy, "whole", "../whole/plain-1.0-py3-none-any.whl is damaged: copy it again")


def test_a_cut_list_is_named(make, copy):
    with (copy / "parts/SHA256SUMS").open("r+b") as file:
        file.truncate(100)
    refused(make, copy, "parts", "../parts/SHA256SUMS is missing or damaged: copy")


def test_another_lock_is_refused(make, copy):
    with (copy / "project/requirements.lock").open("a") as lock:
        lock.write("# another\n")
    refused(make, copy, "whole", "../whole is for Python 3.")


def test_another_folder_is_refused(make, copy):
    refused(make, copy, "project", "../project/SHA256SUMS is missing or damaged: copy")


def test_a_folder_that_exists_is_left_alone(make, copy):
    done = make(copy / "project", "wheelhouse", "WHEELHOUSE=../whole")
    assert (done.returncode, "../whole exists: delete it" in done.stderr) == (2, True)


def test_an_interrupted_download_leaves_no_folder(make, copy):
    pip = 'mkdir "${0%/pip/bin/pip}/wheels"; touch "${0%/pip/bin/pip}/wheels/half.whl"; exit 1'
    python = copy / "python"  # in place of `python -m venv FOLDER`
    python.write_text(f"#!/bin/sh\nmkdir -p $3/bin\necho '#!/bin/sh\n{pip}' > $3/bin/pip\nchmod +x $3/bin/pip\n")
    python.chmod(0o755)
    done = make(copy / "project", "wheelhouse", f"PYTHON={python}")
    assert (done.returncode, [*copy.rglob("half.whl")]) == (2, [copy / "project/wheelhouse.new/wheels/half.whl"])
    assert not (copy / "project/wheelhouse").exists()


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def refused(make, copy, name, message):
    """`make setup` exits with 2 and one line before make's own, which begins with the message; no .venv is begun."""
    done = make(copy / "project", "setup", f"WHEELHOUSE=../{name}")
    error, _ = done.stderr.splitlines()
    assert (done.returncode, error.startswith(message)) == (2, True), done.stderr
    assert not (copy / "project/.venv").exists()
