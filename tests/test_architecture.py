"""Ratchets that hold the shape of the house: floors, rooms, lengths, and dvc.yaml against imports and params.yaml.

A file at the top of src/barlow is a command, a folder is a part. Commands use parts; no part uses a command, and no
command another.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from barlow.cli import STAGES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/barlow"
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
COMMANDS = [name for name in MODULES if "/" not in name and name not in ("__init__", "cli")]
FLOORS = [  # an import never goes up
    {"core"},
    {"settings"},
    {"transfer"},
    {"data", "training", "encoder", "experiments"},
    {"evaluation", "advice"},
    {"serving", "production", "reporting"},
    {*COMMANDS},
    {"cli", "__init__"},
]
SERVING = {"serve", "embed", "encoder/search", "encoder/encoder", "encoder/registry"}  # base install and its extra
NOT_SERVED = {"torch", "torchvision", "nvidia", "dvc", "dvclive", "prefect", "pandas", "great_expectations", "yaml"}
NOT_SERVED |= {"onnx", "onnxscript", "pyarrow", "safetensors", "sklearn"}
EXTRA = {"embed": {"pyarrow"}}  # what an extra adds, of the above
NOT_STAGES = {"promote", "drift"}  # sections of params.yaml that no stage reads: a change there makes nothing run again
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())


@cache
def imports(module):
    """Return (barlow's modules, other top-level packages) that a module imports anywhere."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package: `from barlow.core import files`"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, *inner = name.split(".")
            if top != "barlow":
                others.add(top)
                continue
            known = ["/".join(inner[:n]) for n in (1, 2) if "/".join(inner[:n]) in MODULES]
            ours.add(known[0] if known else f"{inner[0]}/__init__" if len(inner) > 1 else "__init__")
    return frozenset(ours), frozenset(others)


def closure(module):
    """Return the module and all of barlow that it imports, directly or not."""
    found, todo = set(), {module}
    while todo:
        found |= todo
        todo = set().union(*(imports(name)[0] for name in todo)) - found - {"__init__"}
    return found


def room(module):
    return module.partition("/")[0]


@pytest.mark.parametrize("module", MODULES)
def test_an_import_never_goes_up(module):
    floor = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    for other in imports(module)[0] - {"__init__"}:
        up = f"{module} imports {other}, which is above it"
        assert floor[room(other)] < floor[room(module)] or room(other) == room(module), up


def test_every_room_is_on_a_floor():
    assert {room(module) for module in MODULES} == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(set().union(*FLOORS))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_imports_another(command):
    assert closure(command) & {*COMMANDS} == {command}


def test_no_two_modules_import_each_other():
    for module in MODULES:
        for other in imports(module)[0] - {module}:
            assert module not in closure(other), f"{module} and {other} import each other"


def test_serve_reaches_only_what_it_needs():
    assert {room(module) for module in closure("serve")} == {
        "serve", "core", "encoder", "settings", "serving",
    }  # fmt: skip


@pytest.mark.parametrize("module", sorted(SERVING))
def test_serving_needs_no_training_package(module):
    needed = set().union(*(imports(name)[1] for name in closure(module)))
    assert NOT_SERVED & needed == EXTRA.get(module, set())


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_short(module):
    lines = len((PACKAGE / f"{module}.py").read_text().splitlines())
    assert lines <= 250, "is there a second thing in it that wants a room of its own?"


def test_rooms_stay_small():
    for folder in (path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__"):
        files = [path for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"]
        assert len(files) <= 12, f"{folder.name} has {len(files)} files"


def test_median_module_is_short():
    lengths = sorted(len((PACKAGE / f"{module}.py").read_text().splitlines()) for module in MODULES)
    assert lengths[len(lengths) // 2] <= 150


@pytest.mark.parametrize("module", [module for module in MODULES if not module.endswith("__init__")])
def test_each_module_has_its_tests(module):
    folder, _, name = module.rpartition("/")
    if module != "core/errors":
        assert (ROOT / "tests" / folder / f"test_{name}.py").exists()


def test_base_imports_are_declared():
    """What the package imports is in the standard library or in pyproject.toml, by the name that it has there."""
    brought = {"anyio", "pydantic", "starlette", "huggingface_hub"}  # by fastapi and timm
    named = {"yaml": "pyyaml", "PIL": "pillow", "nvidia": "nvidia-dali-cuda130", "ruamel": "ruamel-yaml"}
    named |= {"sklearn": "scikit-learn"}

    declared = (ROOT / "pyproject.toml").read_text()
    for module in MODULES:
        for package in imports(module)[1] - sys.stdlib_module_names - brought:
            assert f'"{named.get(package, package).replace("_", "-")}' in declared, (module, package)


def test_files_beside_the_modules_are_installed():
    (declared,) = re.findall(r"^barlow = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    installed = {path for pattern in re.findall(r'"(.*?)"', declared) for path in PACKAGE.glob(pattern)}
    beside = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert beside == installed


def test_dvc_stages_are_the_commands():
    assert list(DVC["stages"]) == list(STAGES)
    for name, stage in DVC["stages"].items():
        assert stage["cmd"] == f"PATH=.venv/bin:$PATH barlow {name}"
        assert stage["desc"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_what_it_imports(stage):
    """Its module, and folders or files that hold all it imports; not the schema of params.yaml, whose values count."""
    deps = {dep.removeprefix("src/barlow/") for dep in DVC["stages"][stage]["deps"] if dep.startswith("src/")}
    needed = {m for m in closure(stage) if room(m) != "settings" and not m.endswith("__init__")}
    for dep in deps:
        assert any(m == dep.removesuffix(".py") or m.startswith(f"{dep}/") for m in needed), f"{dep} is not imported"
    for module in needed:
        held = [dep for dep in deps if dep == f"{module}.py" or module.startswith(f"{dep}/")]
        assert len(held) == 1, f"{module} is in {len(held)} dependencies"


def test_what_changes_often_never_retrains():
    for stage in ("ingest", "validate", "shard", "pretrain"):
        for dep in DVC["stages"][stage]["deps"]:
            assert not re.match(r"src/barlow/(serving|reporting|production|evaluation($|/intervals))", dep), dep


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_deps_come_from_earlier_stages_or_git(stage):
    earlier = set()
    for name, description in DVC["stages"].items():
        if name == stage:
            break
        earlier |= set(outputs(description))
    tracked = {"data/source.json", "data/start.json", "data/compared.json", "params.yaml", "reports/claims.json"}
    for dep in DVC["stages"][stage]["deps"]:
        assert dep in earlier | tracked or dep.startswith("src/barlow/"), dep


def test_every_params_section_belongs_to_a_stage():
    sections = set(yaml.safe_load((ROOT / "params.yaml").read_text()))
    used = {name.partition(".")[0] for stage in DVC["stages"].values() for name in stage.get("params", [])}
    assert used == sections - NOT_STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_params_it_reads(stage):
    """`params.SECTION` in a stage's own module, against its params in dvc.yaml."""
    sections = set(yaml.safe_load((ROOT / "params.yaml").read_text()))
    tree = ast.parse((PACKAGE / f"{stage}.py").read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params"
    }
    declared = {name.partition(".")[0] for name in DVC["stages"][stage].get("params", [])}
    assert read & sections == declared if stage != "report" else declared == sections - NOT_STAGES


def test_json_metrics_are_in_git_and_not_in_the_cache():
    for name, stage in DVC["stages"].items():
        for metric in stage.get("metrics", []):
            assert metric == {f"reports/{name}.json": {"cache": False}}


def outputs(stage):
    for kind in ("outs", "metrics", "plots"):
        for out in stage.get(kind, []):
            yield out if isinstance(out, str) else next(iter(out))
