"""Ratchets that hold the shape of the house: who imports whom, how long a module is, and dvc.yaml against both."""

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
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
SERVING = {"serve", "search", "embed", "encoder"}  # what runs with the base install and its extra alone
NOT_SERVED = {"torch", "torchvision", "nvidia", "dvc", "dvclive", "prefect", "pandas", "great_expectations", "yaml"}
NOT_SERVED |= {"onnx", "onnxscript", "pyarrow", "safetensors", "sklearn"}
EXTRA = {"embed": {"pyarrow"}}  # what an extra adds, of the above
NOT_STAGES = {"promote", "drift"}  # sections of params.yaml that no stage reads: a change there makes nothing run again
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())


@cache
def imports(module):
    """Return (names of barlow modules, names of other top-level packages) that a module imports anywhere."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top != "barlow":
                others.add(top)
            else:
                ours.add(rest.partition(".")[0] if rest.partition(".")[0] in MODULES else "__init__")
    return frozenset(ours), frozenset(others)


def closure(module):
    """Return the module and every barlow module that it imports, directly or not."""
    found, todo = set(), {module}
    while todo:
        found |= todo
        todo = set().union(*(imports(name)[0] for name in todo)) - found
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_another(stage):
    assert closure(stage) & set(STAGES) == {stage}


@pytest.mark.parametrize("module", sorted(set(MODULES) - set(STAGES) - {"cli"}))
def test_parts_import_no_stage(module):
    assert not closure(module) & set(STAGES)


@pytest.mark.parametrize("module", sorted(SERVING))
def test_serving_needs_no_training_package(module):
    needed = set().union(*(imports(name)[1] for name in closure(module)))
    assert NOT_SERVED & needed == EXTRA.get(module, set())


def test_serving_reads_indexes_and_writes_none():
    assert "search" in closure("serve")
    assert not {"index", "embed", "shards"} & closure("serve")


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_short(module):
    lines = len((PACKAGE / f"{module}.py").read_text().splitlines())
    assert lines <= (280 if module == "params" else 250), "is there a second thing in it that wants a room of its own?"


def test_median_module_is_short():
    lengths = sorted(len((PACKAGE / f"{module}.py").read_text().splitlines()) for module in MODULES)
    assert lengths[len(lengths) // 2] <= 150


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__", "errors"}))
def test_each_module_has_its_tests(module):
    assert (ROOT / f"tests/test_{module}.py").exists()


def test_base_imports_are_declared():
    """What the package imports is in the standard library or in pyproject.toml, by the name that it has there."""
    with_fastapi = {"anyio", "pydantic", "starlette"}
    named = {"yaml": "pyyaml", "PIL": "pillow", "nvidia": "nvidia-dali-cuda130", "ruamel": "ruamel-yaml"}
    named |= {"sklearn": "scikit-learn"}

    declared = (ROOT / "pyproject.toml").read_text()
    for module in MODULES:
        for package in imports(module)[1] - sys.stdlib_module_names - with_fastapi:
            assert f'"{named.get(package, package).replace("_", "-")}' in declared, (module, package)


def test_files_beside_the_modules_are_installed():
    (declared,) = re.findall(r"^barlow = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    patterns = re.findall(r'"(.*?)"', declared)
    for path in PACKAGE.iterdir():
        if path.is_file() and path.suffix != ".py":
            assert any(path.match(pattern) for pattern in patterns), f"{path.name} is not in package-data"


def test_dvc_stages_are_the_commands():
    assert list(DVC["stages"]) == list(STAGES)
    for name, stage in DVC["stages"].items():
        assert stage["cmd"] == f"barlow {name}"
        assert stage["desc"]


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_deps_are_exactly_the_modules_a_stage_imports(stage):
    deps = {Path(dep).stem for dep in DVC["stages"][stage]["deps"] if dep.startswith("src/") and dep.endswith(".py")}
    assert deps == closure(stage) - {"__init__"}


def test_the_report_depends_on_its_templates():
    needed, todo = set(), {"report.html.j2"}
    while todo:
        needed |= todo
        todo = {name for path in todo for name in re.findall(r'"([\w.]+\.j2)"', (PACKAGE / path).read_text())} - needed
    assert needed == {Path(dep).name for dep in DVC["stages"]["report"]["deps"] if dep.endswith(".j2")}


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_deps_come_from_earlier_stages_or_git(stage):
    earlier = set()
    for name, description in DVC["stages"].items():
        if name == stage:
            break
        earlier |= set(outputs(description))
    tracked = {"data/source.json", "params.yaml", "reports/claims.json"}
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
    for stage in DVC["stages"].values():
        for metric in stage.get("metrics", []):
            ((path, options),) = metric.items()
            assert path.startswith("reports/")
            assert options == {"cache": False}


def outputs(stage):
    for kind in ("outs", "metrics", "plots"):
        for out in stage.get(kind, []):
            yield out if isinstance(out, str) else next(iter(out))
