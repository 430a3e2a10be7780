import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from clones import run, set_param
from PIL import Image

from barlow import preset, recommend
from barlow.advice import recipe, speed
from barlow.core import files
from barlow.core.errors import UserError
from barlow.data import manifest
from barlow.experiments import runs
from barlow.settings import editing, loading

ROOT = Path(__file__).parent.parent
SECONDS = 0.006  # of a training step, per image


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with 700 photographs, accepted; `dvc` and `barlow scan` do nothing; a step takes 6 ms at 32 px."""
    photos = tmp_path / "photos"
    photos.mkdir()
    image = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(image).save(photos / "a.jpg")
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    called = []
    monkeypatch.setattr(runs, "barlow", lambda *arguments: called.append(("barlow", *arguments)))
    monkeypatch.setattr(runs, "dvc", lambda *arguments: called.append(("dvc", *arguments)))

    def seconds_per_image(params, tars):
        called.append(("measured", params.views.size, params.pretrain.batch_size))
        return SECONDS * (params.views.size / 32) ** 2

    monkeypatch.setattr(speed, "seconds_per_image", seconds_per_image)
    monkeypatch.setattr(speed, "hardware", lambda params: "2 x Abacus, fp32")
    monkeypatch.setattr(speed, "kind", lambda params: "cpu")
    accept(700)
    change("ingest.source", str(photos))
    return called


def accept(count):
    row = {"path": "a.jpg", "split": "train", "label": "a", "width": 120, "height": 80, "mode": "RGB"}
    rows = [dict.fromkeys(manifest.SCHEMA.names) | row] * count
    manifest.write(pa.Table.from_pylist(rows, manifest.SCHEMA), files.ACCEPTED)


def change(key, value):
    editing.edit(editing.nested({key: value}), "the test")


def value(key):
    return recommend.current(loading.load(), key)


def call(**options):
    recommend.run(loading.load(), **options)


def test_it_writes_what_the_recipe_says_with_the_reasons(project, capsys):
    call()
    assert project[:2] == [("barlow", "scan"), ("dvc", "repro", "validate")]
    assert (value("pretrain.lr_weights"), value("pretrain.lr_biases")) == (0.004, 0.004)
    epochs = value("pretrain.epochs")
    images = 700 // value("pretrain.batch_size") * value("pretrain.batch_size")
    assert epochs * images * SECONDS <= 6 * 60 < (epochs + 1) * images * SECONDS
    out, text = capsys.readouterr().out, Path("params.yaml").read_text()
    for key in recipe.SYNTHETIC:
        [line] = [line for line in out.splitlines() if line.startswith(key)]
        reason = line.split("  ")[-1].strip()
        assert f": {reason}\n" in text, key
    assert "pretrain.lr_weights     0.6 -> 0.004  " in out
    assert "6 minutes of pretraining (--minutes)" in out
    assert f"700 images train for {epochs * (700 // 64):,} steps" in out
    assert [line for line in text.splitlines() if len(line) > 120] == []
    assert not list(files.ACCEPTED.parent.glob(".sample-*"))


def test_twice_is_once(project):
    call()
    before, measured = Path("params.yaml").read_bytes(), project.copy()
    call()
    assert Path("params.yaml").read_bytes() == before
    assert [each for each in project[len(measured) :] if each[0] == "measured"] == []


def test_more_images_or_other_minutes_update_it(project):
    call()
    first = value("pretrain.epochs")
    accept(7000)
    call()
    assert value("pretrain.epochs") == 6 * 60 // (6976 * SECONDS) < first / 5
    call(minutes=60)
    assert value("views.size") == 64
    call()  # the minutes are those of the last time
    assert value("views.size") == 64
    with pytest.raises(UserError, match=r"--minutes 0 is not allowed; it must be above 0"):
        call(minutes=0)


def test_what_the_user_has_set_stays(project, capsys):
    change("pretrain.lr_weights", 0.1)
    change("views.size", 48)
    call()
    assert (value("pretrain.lr_weights"), value("views.size")) == (0.1, 48)
    assert (value("pretrain.optimizer"), value("pretrain.lr_biases")) == ("lars", recipe.LARS_RATES[1])
    assert "pretrain.lr_weights     0.1" in capsys.readouterr().out
    assert [each for each in project if each[0] == "measured"] == [("measured", 48, 64)]

    change("pretrain.epochs", 17)  # what it wrote itself, and the user changed since
    accept(1400)
    call()
    assert value("pretrain.epochs") == 17
    out = capsys.readouterr().out
    assert "yours, not changed; the recipe has " in out
    assert "1,400 images train for 357 steps" in out  # 17 x 21


def test_by_itself_it_chooses_once(project, capsys):
    call(auto=True)
    assert (value("pretrain.optimizer"), value("pretrain.lr_weights")) == ("adamw", 0.004)
    assert "the settings are for other images" in capsys.readouterr().out
    before = Path("params.yaml").read_bytes()
    accept(7000)
    project.clear()
    call(auto=True)
    assert (Path("params.yaml").read_bytes(), project, capsys.readouterr().out) == (before, [], "")


def test_by_itself_it_follows_the_source(project, capsys):
    call(auto=True)
    change("ingest.source", "synthetic")
    call(auto=True)
    assert {key: value(key) for key in recipe.SYNTHETIC} == recipe.SYNTHETIC
    shipped = Path("params.yaml").read_text()
    assert "# recommended" not in shipped
    project.clear()
    capsys.readouterr()
    call(auto=True)
    assert (Path("params.yaml").read_text(), project, capsys.readouterr().out) == (shipped, [], "")

    change("ingest.source", str(Path("photos").resolve()))
    shutil.copy("params.yaml", "shipped.yaml")
    call(auto=True)
    assert (value("pretrain.optimizer"), value("pretrain.lr_weights")) == ("adamw", 0.004)
    shutil.copy("shipped.yaml", "params.yaml")  # as `git checkout params.yaml` does
    call(auto=True)
    assert (value("pretrain.optimizer"), value("pretrain.lr_weights")) == ("adamw", 0.004)


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_by_itself_it_leaves_a_recipe_alone(project, name):
    """Also one of the user's own: whoever has set both learning rates."""
    source = value("ingest.source")
    preset.run(name)
    change("ingest.source", source)
    before = Path("params.yaml").read_bytes()
    call(auto=True)
    assert (Path("params.yaml").read_bytes(), project) == (before, [])


def test_the_default_run_takes_no_time(request, tmp_path):
    """Nothing heavy is imported, nothing printed, nothing written."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    program = (
        "import sys; from barlow import cli; assert cli.main(['recommend', '--auto']) == 0; "
        "assert not {'torch', 'pyarrow', 'nvidia', 'dvc', 'ruamel'} & {*sys.modules}, sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_make_repro_chooses_before_it_runs():
    [recipe_of_repro] = [
        block.splitlines()[1:] for block in (ROOT / "Makefile").read_text().split("\n\n") if block.startswith("repro:")
    ]
    assert [line.strip() for line in recipe_of_repro] == [
        "barlow scan", "barlow recommend --auto", "dvc repro", "barlow summary",
    ]  # fmt: skip


def test_a_damaged_memory_is_named(project):
    files.write_json(recommend.RECOMMENDED, {"source": "a"})
    with pytest.raises(UserError, match=r"data/recommended\.json: minutes is missing"):
        call()


@pytest.mark.slow
def test_a_folder_of_photographs(reproduced, tmp_path):
    """From the folder to the settings, with DVC and measured steps; then all of it goes through `pretrain`."""
    project = tmp_path / "barlow"
    shutil.copytree(reproduced, project, symlinks=True, ignore=shutil.ignore_patterns("features", "registry"))
    for name in ("a", "b"):
        (project / "photos" / name).mkdir(parents=True)
        for i in range(20):
            rng = np.random.default_rng([i, len(name), ord(name)])
            image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
            image.save(project / "photos" / name / f"{i}.png")
    set_param(project, "source: synthetic", "source: photos")
    out = run(project, "barlow", "recommend", "--auto", "--minutes", "0.01")
    assert re.search(r"^a training step of resnet10, stem stride, 24 px, batch 8: [\d,]+ images/s$", out, flags=re.M)
    chosen = yaml.safe_load((project / "params.yaml").read_text())
    kept = json.loads((project / "data/recommended.json").read_text())
    assert chosen["pretrain"]["batch_size"] == kept["values"]["pretrain.batch_size"] == 8
    assert chosen["views"]["size"] == 24  # of the preset, which is the user's choice
    assert kept["source"] == "photos"
    assert run(project, "barlow", "recommend", "--auto") == ""
    out = run(project, "dvc", "repro", "pretrain")
    assert "batches of 8 per epoch" in out


def test_the_network_of_given_weights_stays(smoke, change):
    """They fit no other, even if it is the one that params.yaml is shipped with."""
    last = recommend.Recommended("synthetic", None, {}, {}, {})
    assert not {*recipe.NETWORK} & {*recommend.touched(smoke, last)}
    given = recommend.touched(change(smoke, "model", weights="a.pth"), last)
    assert given == recommend.touched(smoke, last) | {"model.arch": "resnet10", "model.stem": "stride"}
