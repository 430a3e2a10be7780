"""What the README shows is run as it stands, but for the port."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from services import encoded, start

from barlow.evaluation import tables
from barlow.evaluation.figures import Evaluation, FineTuning, build

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.fixture(scope="module")
def service(tmp_path_factory, indexed):
    """A service as after `make serve`, and a folder with a.jpg and b.png."""
    folder = tmp_path_factory.mktemp("readme")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    (folder / "a.jpg").write_bytes(encoded(pixels, "JPEG"))
    (folder / "b.png").write_bytes(encoded(pixels))
    with start(indexed / "models/encoder.onnx", cwd=indexed) as service:
        yield service, folder


def test_curl(service):
    running, folder = service
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("curl")]
    assert len(lines) == 5
    results = []
    for line in lines:
        command = "set -e; " + line.replace("127.0.0.1:8000", f"127.0.0.1:{running.port}").replace(
            "curl", "curl -sSf", 1
        )
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, (line, done.stderr)
        results.append(done.stdout)
    embedded, classified, found, encoded_alike, metrics = results
    assert [result["name"] for result in json.loads(embedded)["results"]] == ["a.jpg", "b.png"]
    assert len(json.loads(classified)["results"][0]["probabilities"]) == 3
    assert len(json.loads(found)["results"][0]["neighbours"]) == 5
    first = json.loads(embedded)["results"][0]["embedding"]
    assert json.loads(encoded_alike)["results"][0]["embedding"] == pytest.approx(first, rel=1e-5)
    assert 'barlow_requests_total{path="/v1/embed",status="200"} 2.0' in metrics


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's own dependencies
def test_python(service, monkeypatch, indexed):
    from barlow.encoder.encoder import Encoder

    running, folder = service
    monkeypatch.chdir(folder)
    (folder / "models").symlink_to(indexed / "models")
    [program] = [block for block in blocks("python") if "tritonclient" in block]
    names = {}
    exec(program.replace("127.0.0.1:8000", f"127.0.0.1:{running.port}"), names)
    assert names["vector"] == pytest.approx(Encoder("models/encoder.onnx").embed(["a.jpg"]), rel=1e-4, abs=1e-4)
    [program] = [block for block in blocks("python") if "from barlow import Encoder" in block]
    exec(program, names)
    assert names["vectors"] == pytest.approx(Encoder("models/encoder.onnx").embed(["a.jpg", "b.png"]))


def test_the_rates_for_images_of_ones_own_are_a_tenth_of_the_defaults():
    """As the comment on `ingest.source` has them too."""
    [block] = [yaml.safe_load(block) for block in blocks("yaml") if "lr_weights" in block]
    text = (ROOT / "params.yaml").read_text()
    defaults = yaml.safe_load(text)["pretrain"]
    assert block == {"pretrain": {name: pytest.approx(defaults[name] / 10) for name in ("lr_weights", "lr_biases")}}
    before = text[: text.index("  source: synthetic")]
    for name, value in block["pretrain"].items():
        assert f"pretrain.{name}: {value}" in before


def recorded(name):
    """What a person recorded of a run, and no stage writes: `make repro` may have left other figures in reports/."""
    return json.loads((ROOT / f"benchmarks/{name}.json").read_text())


def test_the_results_are_what_summary_prints_of_the_recorded_run():
    record = recorded("default_run")
    evaluation = build(Evaluation, record["evaluate"], "default_run.json")
    finetuning = build(FineTuning, record["finetune"], "default_run.json")
    assert f"```\n{tables.table(evaluation, finetuning)}\n```" in README


def test_what_it_says_of_other_seeds_is_what_they_came_out_at():
    first, *others = (record["encoders"]["pretrained"] for record in recorded("seeds"))
    lower = [round(first[kind]["top1"] - other[kind]["top1"]) for kind in ("linear", "knn") for other in others]
    assert f"two other seeds came out {min(lower)} to {max(lower)} points lower" in README


def test_each_row_of_the_seeds_is_that_of_the_recorded_metrics():
    """Figures with an interval, in their order: linear probe and kNN, each of the encoder and of a random one."""
    results = (ROOT / "benchmarks/RESULTS.md").read_text().partition("\n| seed |")[2]
    seeds = recorded("seeds")
    for row, metrics in zip(results.splitlines()[2:], seeds, strict=False):
        shown = re.findall(r"([\d.]+) \(([\d.]+)-([\d.]+)\)", row)
        assert row.startswith(f"| {metrics['seed']} |")
        accuracies = [metrics["encoders"][e][kind] for kind in ("linear", "knn") for e in ("pretrained", "random")]
        assert [list(cell) for cell in shown] == [
            [f"{accuracy[key]:.1f}" for key in ("top1", "low", "high")] for accuracy in accuracies
        ]
    assert len(seeds) >= 3
