import json
import shutil
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from clones import run
from scipy import stats

from barlow import claims, cli
from barlow.core import files
from barlow.data import sources
from barlow.evaluation.figures import Evaluation, Images, Scores
from barlow.experiments import grid
from barlow.settings import loading

ROOT = Path(__file__).parent.parent
PASS, FAIL, MAYBE = (1.0, 5.0), (-9.0, -1.0), (-2.0, 3.0)


def rule(difference="above", points=0.0, compare=("b",)):
    return grid.Rule(compare, "a", difference, points, "...")


@pytest.mark.parametrize(
    ("intervals", "above", "below"),
    [
        ([PASS], "shown", "contradicted"),
        ([FAIL], "contradicted", "shown"),
        ([MAYBE], "not shown", "not shown"),
        ([PASS, PASS], "shown", "contradicted"),
        ([PASS, MAYBE], "not shown", "contradicted"),
        ([FAIL, MAYBE], "contradicted", "not shown"),
        ([PASS, FAIL], "contradicted", "contradicted"),
        ([(float("-inf"), float("-inf"))], "contradicted", "shown"),
        ([(float("nan"), float("nan"))], "not shown", "not shown"),
    ],
)
def test_verdicts(intervals, above, below):
    assert claims.verdict(rule("above"), intervals) == above
    assert claims.verdict(rule("below"), intervals) == below
    moved = [(low - 5, high - 5) for low, high in intervals]
    assert claims.verdict(rule("above", -5.0), moved) == above
    assert claims.verdict(rule("below", -5.0), moved) == below


def runs_of(*percents):
    return [{"seed": seed, "top1": each, "experiment": f"e{seed}"} for seed, each in enumerate(percents)]


def test_an_experiment_without_labels_counts_as_failed():
    scores = {"seed": 1, "failed": "no accuracy: train, val or test has no labels"}
    bare = Evaluation(0, Images(0, 0, 0), {"pretrained": Scores(None, None, None, None, {}, None)}, {})
    assert claims.outcome(1, "e", {"e": bare}, {}) == scores
    assert claims.outcome(1, "e", {}, {"e": "out of memory"}) == {"seed": 1, "failed": "out of memory"}


def test_a_points_interval_is_students_and_the_images_in_quadrature():
    point = claims.measure([*runs_of(50.0, 53.0, 58.0), {"seed": 3, "failed": "..."}], 1000)
    of_runs = stats.t.ppf(0.975, 2) * stats.sem([50.0, 53.0, 58.0])
    of_images = 1.96 * (53.67 * 46.33 / 1000) ** 0.5
    assert point["mean"] == pytest.approx(161 / 3)
    for end in (point["mean"] - point["low"], point["high"] - point["mean"]):
        assert end == pytest.approx((of_runs**2 + of_images**2) ** 0.5, rel=0.01)


def test_one_run_tells_nothing():
    point = claims.measure(runs_of(50.0), 1000)
    assert (point["mean"], point["low"], point["high"]) == (50.0, 0.0, 100.0)


def test_a_difference_of_two_equal_intervals_is_wider_by_the_root_of_two():
    a, b = ({"mean": mean, "low": mean - 3, "high": mean + 3} for mean in (50.0, 60.0))
    difference, (low, high) = claims.difference(b, a)
    assert (difference, low, high) == pytest.approx((10, 10 - 18**0.5, 10 + 18**0.5))


def test_a_claim_is_told_with_its_figures_and_its_failures():
    claim = grid.Claim("n", "Title", "The paper says.", "x", rule(compare=("b", "c")), ())
    runs, better = runs_of(50.0, 51.0, 52.0), runs_of(80.0, 81.0, 82.0)
    failed = [{"seed": 0, "failed": "the loss is not finite"}]
    points = [
        {"label": label, "base": label == "a", "params": {}} | claims.measure(each, 1000)
        for label, each in {"a": runs, "b": better, "c": [*failed, *better[1:]]}.items()
    ]
    told = claims.judge(claim, points)
    assert told["verdict"] == "shown"
    assert told["text"].startswith("Points of accuracy against a, with 95 % intervals: b: +30.0 (")
    assert told["text"].endswith(" 1 run(s) failed.")
    table = claims.table(told).splitlines()
    assert table[0] == "### Title: shown"
    rows = [line for line in table if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| x", "| a (base)", "| b", "| c"]
    assert rows[1].endswith("| 50.0, 51.0, 52.0 |")
    assert rows[3].endswith("| failed, 81.0, 82.0 |")

    points[2] |= claims.measure(failed, 1000)
    told = claims.judge(claim, points)
    assert (told["verdict"], points[2]["mean"]) == ("contradicted", None)
    assert "c: every run failed." in told["text"]
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert "| c |  |  | failed |" in claims.table(told)


def test_an_unknown_claim_and_other_data_end_before_anything_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(["claims", "lambda", "size"]) == 2
    assert "claim 'size' is not known; there are: batch_size, dimension" in capsys.readouterr().err
    assert cli.main(["claims", "--preset", "gpu"]) == 2
    assert "is for ingest.source=torchvision:CIFAR10, and params.yaml has synthetic" in capsys.readouterr().err


def test_the_file_in_git_is_one_that_claims_wrote_or_the_first():
    there = files.read_json(ROOT / files.CLAIMS)
    # of the data that the default run has: its report shows them
    assert there["claims"] == [] or there["data"] == sources.identity(loading.load(ROOT / "params.yaml").ingest)
    assert there["claims"] == [] or {claim["verdict"] for claim in there["claims"]} <= {
        "shown", "not shown", "contradicted"
    }  # fmt: skip


STAGES = """
import json, os, sys, time
from pathlib import Path
import psutil, yaml

stage, params, control = sys.argv[1], yaml.safe_load(Path("params.yaml").read_text()), Path(os.environ["CONTROL"])
with (control / "ran").open("a") as log:
    log.write(f"{stage} {params['pretrain']['lambd']} {params['pretrain']['seed']}\\n")
if stage == "shard":
    Path("data/shards").mkdir(parents=True)
    Path("data/shards/a").write_text("a")
if stage == "pretrain":
    if params["pretrain"]["lambd"] == 1 and (control / "broken").exists():
        sys.exit("barlow pretrain: the loss is not finite at step 3")
    if params["pretrain"]["lambd"] == 1 and (control / "waits").exists():
        (control / "pid").write_text(str(os.getpid()))
        for parent in psutil.Process().parents():
            if "barlow.cli" in parent.cmdline():
                parent.terminate()
        time.sleep(600)
    Path("models").mkdir(exist_ok=True)
    Path("models/encoder").write_text(str(50 + params["pretrain"]["lambd"] + params["pretrain"]["seed"]))
    Path("reports").mkdir(exist_ok=True)
    Path("reports/pretrain.json").write_text('{"seconds": 2.0}')
if stage == "evaluate":
    linear = {"top1": float(Path("models/encoder").read_text()), "low": 0, "high": 100}
    scores = {"linear": linear, "knn": None, "knn_val": None, "l2": 0.001, "few_labels": {}, "health": None}
    images = {"train": 1000, "val": 1000, "test": 1000}
    metrics = {"classes": 10, "images": images, "encoders": {"pretrained": scores}, "gains": {}}
    Path("reports/evaluate.json").write_text(json.dumps(metrics))
"""
DVC = """
stages:
  shard: {cmd: python src/stages.py shard, deps: [src/stages.py], outs: [data/shards]}
  pretrain:
    cmd: python src/stages.py pretrain
    deps: [data/shards, src/stages.py]
    params: [pretrain]
    outs: [models/encoder]
    metrics: [reports/pretrain.json: {cache: false}]
  extract: {cmd: "true", deps: [models/encoder], params: [extract]}
  evaluate:
    cmd: python src/stages.py evaluate
    deps: [models/encoder, src/stages.py]
    params: [evaluate]
    metrics: [reports/evaluate.json: {cache: false}]
"""


def small_claim(name, first, second):
    points = [{"label": str(value), "params": {"pretrain.lambd": value}} for value in (first, second)]
    given = {"compare": [str(second)], "against": str(first), "difference": "above", "points": -20, "text": "..."}
    return {"name": name, "title": name, "claim": "...", "x_label": "lambda", "rule": given, "points": points}


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A project with stages that take no time; `broken` in its folder `control` lets some experiments fail."""
    project, control = tmp_path / "project", tmp_path / "control"
    (project / "presets/claims").mkdir(parents=True)
    (project / "src").mkdir()
    control.mkdir()
    shutil.copy(ROOT / "params.yaml", project)
    small = {"data": "synthetic", "seeds": [0], "base": {}}
    small["claims"] = [small_claim("flat", 0.002, 0.5), small_claim("wide", 0.002, 1.0)]
    (project / "presets/claims/small.yaml").write_text(yaml.safe_dump(small))
    (project / "src/stages.py").write_text(STAGES)
    (project / "dvc.yaml").write_text(DVC)
    (project / ".gitignore").write_text("/data\n/models\n/reports/*\n!/reports/*.json\n")
    monkeypatch.setenv("CONTROL", str(control))
    for command in (
        ["git", "init"],
        ["git", "config", "user.name", "t"],
        ["git", "config", "user.email", "t@localhost"],
    ):
        run(project, *command)
    run(project, sys.executable, "-m", "dvc", "init", "--quiet")
    run(project, sys.executable, "-m", "dvc", "repro", "--quiet", "shard")
    run(project, "git", "add", ".")
    run(project, "git", "commit", "--quiet", "-m", "test")
    return project, control


def trained(control):
    """Return what was pretrained since the last call: lambda, sorted."""
    log = control / "ran"
    lines = [line.split() for line in log.read_text().splitlines()]
    log.unlink()
    return sorted(float(lambd) for stage, lambd, _ in lines if stage == "pretrain")


@pytest.mark.slow
def test_what_has_run_is_not_run_again_and_what_failed_or_was_stopped_is(stub, monkeypatch, capfd):
    project, control = stub
    monkeypatch.chdir(project)
    trained(control)
    (control / "broken").touch()
    assert cli.main(["claims", "wide", "--preset", "small", "--jobs", "2"]) == 0
    assert "2 experiments, 2 of them to run" in capfd.readouterr().out
    assert trained(control) == [0.002, 1.0]
    first = files.read_json(files.CLAIMS)
    (told,) = first["claims"]
    base, other = told["points"]
    assert (base["base"], base["mean"], other["base"], other["mean"]) == (True, pytest.approx(50.002), False, None)
    assert other["runs"] == [{"seed": 0, "failed": "barlow pretrain: the loss is not finite at step 3"}]
    assert (told["verdict"], first["seconds"]) == ("contradicted", 2)
    assert first["data"] == sources.identity(loading.load().ingest)
    assert first["revision"] == run(project, "git", "rev-parse", "HEAD").strip()
    (control / "broken").unlink()

    (control / "waits").touch()
    said = run(project, sys.executable, "-m", "barlow.cli", "claims", "wide", "--preset", "small", code=75)
    assert "run again to go on" in said
    pid = int((control / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert trained(control) == [1.0]
    assert run(project, "git", "status", "--porcelain", "--", "params.yaml") == ""  # DVC has put it back
    assert run(project, "git", "branch", "--show-current").strip()
    (control / "waits").unlink()

    (project / "src/other.py").write_text("# what no stage reads")
    run(project, "git", "add", ".")
    run(project, "git", "commit", "--quiet", "-m", "another commit")
    assert cli.main(["claims", "flat", "--preset", "small"]) == 0
    assert trained(control) == [0.5]  # the base is known from another commit
    second = files.read_json(files.CLAIMS)
    assert [claim["name"] for claim in second["claims"]] == ["flat", "wide"]
    assert second["claims"][1] == told
    assert second["claims"][0]["points"][1]["runs"][0]["top1"] == 50.5
