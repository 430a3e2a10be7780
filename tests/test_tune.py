import shutil
from pathlib import Path

import pytest
import yaml
from clones import commit, run

from barlow import tune
from barlow.advice import speed
from barlow.core import files
from barlow.core.errors import Interrupted, UserError
from barlow.evaluation import figures
from barlow.evaluation.figures import Accuracy, Evaluation, Health, Images, Scores
from barlow.experiments import runs
from barlow.settings import loading

ROOT = Path(__file__).parent.parent
INPUTS = {"code": "1", "shards": "2", "sections": ["evaluate", "extract", "model", "pretrain", "views"]}


def measured(knn, rank):
    health = Health(300, rank, 0.5, 0.1, 0.2, -2.5)
    accuracy = None if knn is None else Accuracy(knn, 0.0, 100.0)
    scores = Scores(None, None, accuracy, None, {}, health)
    return Evaluation(4, Images(1000, 1000, 1000), {"pretrained": scores}, {})


@pytest.fixture
def experiments(project, monkeypatch):
    """A project whose experiments take no time; `experiments.outcome(values)` says what each comes to."""
    shutil.copy(ROOT / "params.yaml", project)

    class Experiments:
        done, ran, fail = {}, [], None
        labelled = True

        def outcome(self, values):
            """kNN is best at a third of the rate and the smaller crop; the rank falls with the rate."""
            rate, (low, _) = values.get("pretrain.lr_weights", 0.6), values.get("views.crop_area", (0.3, 1.0))
            knn = {0.2: 70.0, 0.6: 60.0, 1.8: 50.0}[rate] + {0.1: 9.0, 0.3: 0.0, 0.6: -9.0}[low]
            return measured(knn if self.labelled else None, 100 / rate)

        def run_missing(self, todo, jobs):
            missing = {name: values for name, values in todo.items() if name not in self.done}
            failed = {}
            for name, values in missing.items():
                if self.fail and self.fail(values):
                    failed[name] = "the loss is not finite"
                else:
                    self.ran.append(values)
                    self.done[name] = self.outcome(values)
            return failed

    fake = Experiments()
    Experiments.done, Experiments.ran = {}, []
    monkeypatch.setattr(runs, "require_git", lambda: None)
    monkeypatch.setattr(runs, "dvc", lambda *arguments: None)
    monkeypatch.setattr(runs, "inputs", lambda: INPUTS)
    monkeypatch.setattr(runs, "run_missing", fake.run_missing)
    monkeypatch.setattr(runs, "finished", lambda: {name: name for name in fake.done})

    def read(reference, path):
        figures.write(Path("outcome.json"), fake.done[reference])
        return files.read_json("outcome.json")

    monkeypatch.setattr(runs, "read", read)
    monkeypatch.setattr(speed, "seconds_per_image", lambda params, tars: 0.05)  # an epoch of 192 images takes 9.6 s
    monkeypatch.setattr(speed, "kind", lambda params: "cpu")
    return fake


def call(**options):
    tune.run(loading.load(), **options)


def test_one_setting_after_the_other_each_with_the_best_so_far(experiments, capsys):
    call(minutes=6.8)
    tried = [(v.get("pretrain.lr_weights", 0.6), v.get("views.crop_area", [0.3])[0]) for v in experiments.ran]
    assert tried == [(0.6, 0.3), (0.2, 0.3), (1.8, 0.3), (0.2, 0.1), (0.2, 0.6), (0.2, 0.1), (0.2, 0.1)]
    assert [v.get("pretrain.lambd") for v in experiments.ran] == [None] * 5 + [0.000667, 0.006]
    assert {v["pretrain.epochs"] for v in experiments.ran} == {6}  # 6.8 minutes / 7 runs / 9.6 s
    assert {v["pretrain.warmup_epochs"] for v in experiments.ran} == {1.0}
    report = files.read_json(files.TUNING)
    assert report["values"] == {
        "pretrain.lr_weights": 0.2, "pretrain.lr_biases": 0.0048, "views.crop_area": [0.1, 1.0],
    }  # fmt: skip
    assert [(c["factor"], c["before"], c["chosen"], c["labels"], c["rank"]) for c in report["choices"]] == [
        ("learning rate", "0.6", "0.2", "0.2", "0.2"),
        ("crop area", "0.3 to 1", "0.1 to 1", "0.1 to 1", "0.3 to 1"),
        ("lambda", "0.002", "0.002", "0.002", "0.002"),
    ]
    out = capsys.readouterr().out
    assert "7 runs of 6 epochs (18 steps), about 6.7 minutes of pretraining in all" in out
    assert "| 0.2 | 0.1 to 1 | 0.002 | 79.0 | 500.0 |" in out
    assert out.count("| 0.6 | 0.3 to 1 | 0.002 |") == 1
    assert "learning rate: 0.2 instead of 0.6 by kNN; the same by the effective rank" in out
    assert "crop area: 0.1 to 1 instead of 0.3 to 1 by kNN; 0.3 to 1 by the effective rank" in out
    assert "lambda: 0.002 (as it is) by kNN; the same by the effective rank" in out
    assert "`barlow tune --apply` writes this into params.yaml" in out
    assert loading.load() == loading.load(ROOT / "params.yaml")


def test_without_labels_the_effective_rank_chooses_and_crops_stay(experiments, tmp_path, monkeypatch, capsys):
    """Ranks of encoders that were trained on other views do not compare."""
    monkeypatch.setattr(tune.features, "labelled", lambda split: iter(()))
    experiments.labelled = False
    call(minutes=10)
    assert len(experiments.ran) == 5
    assert all("views.crop_area" not in values for values in experiments.ran)
    assert files.read_json(files.TUNING)["values"] == {"pretrain.lr_weights": 0.2, "pretrain.lr_biases": 0.0048}
    assert "by kNN" not in capsys.readouterr().out


def test_the_winner_is_written_on_request_and_nothing_runs_again(experiments, capsys, monkeypatch):
    call(minutes=6.8)
    ran = len(experiments.ran)
    monkeypatch.setattr(speed, "seconds_per_image", lambda params, tars: 0.01)  # the machine is quicker today
    call(minutes=6.8, apply=True)
    assert len(experiments.ran) == ran
    params = loading.load()
    assert (params.pretrain.lr_weights, params.pretrain.lr_biases, params.views.crop_area) == (0.2, 0.0048, (0.1, 1.0))
    assert "pretrain.lr_weights: 0.6 -> 0.2" in capsys.readouterr().out
    assert "# recommended 0.2: barlow tune, by kNN on val" in Path("params.yaml").read_text()


def test_an_interrupted_call_is_gone_on_with(experiments, monkeypatch):
    def stop(*_):
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "run_missing", stop)
        with pytest.raises(Interrupted):
            call(minutes=6.8)
    plan = files.read_json(files.TUNING)["plan"]
    monkeypatch.setattr(speed, "seconds_per_image", lambda params, tars: 0.01)
    call(minutes=6.8)
    assert files.read_json(files.TUNING)["plan"] == plan
    call(minutes=13)  # other minutes are another plan
    assert files.read_json(files.TUNING)["plan"] != plan


def test_a_run_that_fails_is_shown_and_never_chosen(experiments, capsys):
    experiments.fail = lambda values: values.get("pretrain.lr_weights") == 1.8
    call(minutes=6.8)
    assert "| 1.8 | 0.3 to 1 | 0.002 | the loss is not finite |  |" in capsys.readouterr().out
    assert files.read_json(files.TUNING)["choices"][0]["chosen"] == "0.2"
    experiments.done.clear()
    experiments.fail = lambda values: True
    with pytest.raises(UserError, match="every run failed: the loss is not finite"):
        call(minutes=6.8)


def test_a_folder_without_git_and_impossible_minutes(project, monkeypatch):
    shutil.copy(ROOT / "params.yaml", project)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent))
    with pytest.raises(UserError, match="this folder is not in a git repository"):
        call()
    with pytest.raises(UserError, match=r"--minutes -1 is not allowed"):
        call(minutes=-1)


@pytest.mark.soak
def test_a_whole_tuning_by_dvc(reproduced, tmp_path):
    project = tmp_path / "barlow"
    shutil.copytree(reproduced, project, symlinks=True)
    commit(project)
    out = run(project, "barlow", "tune", "--minutes", "0.2")
    report = files.read_json(project / files.TUNING)
    assert len(report["runs"]) in (3, 5, 7)
    assert all(row["effective_rank"] > 1 and 0 <= row["knn"] <= 100 for row in report["runs"])
    again = run(project, "barlow", "tune", "--minutes", "0.2", "--apply")
    assert ", 0 of them to run" in again
    assert "Running stage" not in again
    written = yaml.safe_load((project / "params.yaml").read_text())
    for key, value in report["values"].items():
        section, _, name = key.partition(".")
        assert written[section][name] == value
    assert "learning rate: " in out
