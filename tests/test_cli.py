import importlib
import inspect
import os
import subprocess
import sys
import types

import pytest

from barlow import cli
from barlow.core.errors import DataError, Interrupted, UserError
from barlow.settings.flags import Flags


@pytest.fixture
def stage(monkeypatch, request):
    """Put a stand-in for barlow.ingest in place, whose run does what the test says."""
    monkeypatch.chdir(request.config.rootpath)
    module = types.ModuleType("barlow.ingest")
    monkeypatch.setitem(sys.modules, "barlow.ingest", module)
    return module


@pytest.mark.parametrize(("error", "code"), [(UserError, 2), (DataError, 3), (Interrupted, 75)])
def test_exit_codes(stage, capsys, error, code):
    def run(params):
        raise error("pretrain.batch_size=7 is odd")

    stage.run = run
    assert cli.main(["ingest"]) == code
    assert capsys.readouterr().err == "barlow ingest: pretrain.batch_size=7 is odd\n"


def test_success_is_zero_and_a_bug_is_not_hidden(stage):
    stage.run = lambda params: None
    assert cli.main(["ingest"]) == 0
    stage.run = lambda params: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cli.main(["ingest"])


def test_a_missing_extra_is_named(stage, capsys):
    def run(params):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    stage.run = run
    assert cli.main(["ingest"]) == 2
    assert capsys.readouterr().err == "barlow ingest: torch is not installed; pip install 'barlow[train]'\n"


def test_only_pretrain_has_a_dry_run(stage, monkeypatch, capsys):
    seen = []
    module = types.ModuleType("barlow.pretrain")
    module.run = lambda params, dry_run: seen.append(dry_run)
    monkeypatch.setitem(sys.modules, "barlow.pretrain", module)
    assert cli.main(["pretrain"]) == cli.main(["pretrain", "--dry-run"]) == 0
    assert seen == [False, True]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["ingest", "--dry-run"])
    assert "unrecognized arguments: --dry-run" in capsys.readouterr().err


@pytest.fixture
def call(monkeypatch):
    """`call(command, *arguments)` returns what the command's function gets, by name."""

    def call(command, *arguments):
        seen = []
        module = types.ModuleType(f"barlow.{command}")
        module.run = lambda **values: seen.append(values)
        monkeypatch.setitem(sys.modules, f"barlow.{command}", module)
        assert cli.main([command, *arguments]) == 0
        return seen.pop()

    return call


def test_index_takes_files_folders_or_nothing(call):
    default = {"paths": [], "out": "models/index", "model": "models/encoder.onnx", "keep": False}
    assert call("index") == default
    given = call("index", "a.jpg", "photos", "--out", "there", "--model", "other.onnx", "--keep")
    assert given == {"paths": ["a.jpg", "photos"], "out": "there", "model": "other.onnx", "keep": True}


def test_each_kind_is_promoted_by_name(call, capsys):
    for command, rest in {"promote": {"check": False}, "rollback": {"version": None}}.items():
        for flags, kind in (((), "encoder"), (("--kind", "classifier"), "classifier")):
            given = call(command, *flags)
            assert given.pop("params")
            assert given == {"kind": kind, **rest}
    with pytest.raises(SystemExit, match="2"):
        cli.main(["promote", "--kind", "picture"])
    assert "invalid choice: 'picture'" in capsys.readouterr().err


def test_finetune_takes_all_labels_on_request(call):
    assert [call("finetune", *flags)["all_labels"] for flags in ((), ("--all-labels",))] == [False, True]


def test_serve_has_a_flag_for_each_setting(call):
    default = {"model": "models/encoder.onnx", "host": "127.0.0.1", "port": 8000, "index": "models/index"}
    assert call("serve") == default | vars(Flags())
    settings = {name: number for number, name in enumerate(vars(Flags()), 101)}
    flags = [f"--{name.replace('_', '-')}={number}" for name, number in settings.items()]
    given = {"model": "m.onnx", "host": "::1", "port": 80, "index": "there"}
    assert call("serve", *flags, *(f"--{name}={value}" for name, value in given.items())) == given | settings


def test_a_setting_that_is_no_number_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "--max-queue", "many"])
    assert "argument --max-queue: invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["index", "--help"], ["serve", "--help"]])
def test_help_answers_at_once(arguments):
    """Of processor time, at best: other processes do not count."""

    def seconds():
        before = os.times()
        command = [sys.executable, "-m", "barlow.cli", *arguments]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=30)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert any(seconds() < 0.3 for _ in range(5))


def test_help_imports_nothing_heavy():
    code = "import sys; from barlow import cli; cli.parser(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "nvidia.dali", "yaml", "dvc", "prefect", "fastapi", "onnxruntime"} & set(
        modules
    )


def test_the_commands_are_the_files_at_the_top(request):
    files = {path.stem for path in (request.config.rootpath / "src/barlow").glob("*.py")} - {"__init__", "cli"}
    (commands,) = (action for action in cli.parser()._actions if action.dest == "command")
    assert set(commands.choices) == files
    assert set(cli.STAGES) < cli.READS_PARAMS < files


@pytest.mark.parametrize("command", sorted(cli.READS_PARAMS))
def test_who_reads_params_gets_them_first(command):
    module = importlib.import_module(f"barlow.{command}")
    assert next(iter(inspect.signature(module.run).parameters)) == "params"


def test_compare_takes_a_revision(call):
    assert call("compare", "HEAD~1") == {"revision": "HEAD~1"}
