import subprocess
import sys
import types

import pytest

from barlow import cli
from barlow.errors import DataError, Interrupted, UserError


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


def test_scan_passes_the_data_section(stage):
    seen = []
    stage.scan = seen.append
    assert cli.main(["scan"]) == 0
    assert seen[0].source == "synthetic"


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


def test_help_imports_nothing_heavy():
    code = "import sys; from barlow import cli; cli.parser(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "nvidia.dali", "yaml", "dvc", "prefect"} & set(modules)


def test_each_stage_has_a_command_and_a_module(request):
    for stage in cli.STAGES:
        assert (request.config.rootpath / f"src/barlow/{stage}.py").exists()
        assert cli.parser().parse_args([stage]).command == stage
