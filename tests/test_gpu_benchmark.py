"""`benchmarks/gpu.py` on the CPU: what the first machine with a GPU runs must need no debugging there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks/gpu.py"
HEAVY = (
    "dvclive",
    "pandas",
    "great_expectations",
    "ruamel",
    "pyarrow",
    "tqdm",
    "dvc",
    "sklearn",
    "onnxruntime",
    "PIL.X",
)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    return module


def test_what_trains_on_a_gpu_imports_nothing_heavy(tmp_path):
    """A bare machine has torch, torchvision, DALI, numpy, scipy, Pillow, safetensors, jaxtyping and PyYAML."""
    code = f"""
import runpy, sys
for name in {HEAVY}:
    sys.modules[name] = None  # an import of it fails
sys.argv = ["gpu.py", "--device", "cpu", "--tiny", "--out", {str(tmp_path)!r}, "--steps", "right_lars,right_resume"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert [figure["value"] for figure in found["right_resume"]["figures"]] == [0, 0]


def run(gpu, folder, *options):
    return gpu.main(["--device", "cpu", "--tiny", "--out", str(folder), *options])


def test_it_goes_on_with_what_has_no_result(gpu, tmp_path, monkeypatch, capsys):
    ran = []

    def first(bench):
        """One."""
        ran.append("first")
        yield gpu.Figure("a figure", 2.0, "ms", (1, 3))

    def second(bench):
        """Two."""
        ran.append("second")
        yield gpu.Figure("another", 1.0)
        if ran.count("second") < 3:
            raise gpu.Unfinished("1 of 2") if ran.count("second") == 1 else RuntimeError("broken")

    monkeypatch.setattr(gpu, "STEPS", {"first": first, "second": second})
    assert [run(gpu, tmp_path, "--steps", "first,second") for _ in range(3)] == [1, 1, 0]
    assert ran == ["first", "second", "second", "second"]
    out = capsys.readouterr().out
    assert "a figure" in out
    assert "(at least 1 and at most 3: holds)" in out
    assert "RuntimeError: broken" in out
    assert run(gpu, tmp_path, "--steps", "first", "--minutes", "0") == 0


def test_a_missed_bound_is_told_and_makes_it_fail(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STEPS", {"slow": lambda bench: iter([gpu.Figure("rate", 9.0, "pairs/s", (10, None))])})
    gpu.STEPS["slow"].__doc__ = "Slow."
    assert run(gpu, tmp_path, "--steps", "slow") == 1
    out = capsys.readouterr().out
    assert "(at least 10: MISSED)" in out
    assert "missed: rate" in out
    assert run(gpu, tmp_path, "--steps", "slow") == 1  # a result that is there, and still missed


def test_without_a_gpu_it_says_so(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        gpu.main(["--out", str(tmp_path)])
    assert error.value.code == 2
    assert "PyTorch sees no GPU here; --device cpu --tiny rehearses the steps" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["cifar", "photos"])
def test_a_path_that_is_not_there_is_named(gpu, tmp_path, capsys, option):
    with pytest.raises(SystemExit) as error:
        run(gpu, tmp_path, f"--{option}", str(tmp_path / "none"))
    assert error.value.code == 2
    assert f"--{option} {tmp_path / 'none'} is not there" in capsys.readouterr().err


@pytest.mark.soak
def test_the_whole_of_it_on_the_cpu(tmp_path):
    """Every step, in sizes that prove nothing; the second call has nothing left to do."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    figures = {figure["name"] for result in found.values() for figure in result["figures"]}
    wanted = (
        "resized crop: largest",
        "ResNet-18: rate",
        "ResNet-18: loss, device",
        "kNN after 2 of 2 epochs",
        "ONNX: least cosine",
    )
    assert set(wanted) <= figures
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(found) >= 14
