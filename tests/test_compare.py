import re
import shutil
import subprocess

import pytest
from dvc.repo import Repo

from barlow import compare
from barlow.core import files
from barlow.core.errors import UserError
from barlow.reporting import pages

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc")  # its own
OLD = {"linear": {"top1": 50.0, "low": 47.0, "high": 53.0}, "knn": {"top1": 40.0}, "classes": 10}
NEW = {"linear": {"top1": 60.5, "low": 57.0, "high": 63.0}, "knn": {"top1": 40.0}, "health": {"uniformity": -2.5}}


def git(*arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A project whose first commit has no metrics; then one, `old`, has a run, and so has the working folder."""
    root = tmp_path_factory.mktemp("repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        git("init", "-q")
        dvc = Repo.init()
        compare.PARAMS.write_text("pretrain: {epochs: 8, lr: 0.5}\nviews: {size: 32}\n")
        git("add", ".")
        git("commit", "-qm", "nothing measured")
        git("tag", "first")
        files.write_json(files.REPORTS / "evaluate.json", OLD)
        files.write_json(files.REPORTS / "export.json", {"space": "one", "dim": 512})
        pages.CURVES.mkdir(parents=True)
        for name in ("loss", "std"):
            (pages.CURVES / f"{name}.tsv").write_text(f"step\t{name}\n0\t9\n1\t5\n")
        dvc.add(str(files.REPORTS / "pretrain"))
        for name in compare.OF_MANY_RUNS:
            files.write_json(files.REPORTS / f"{name}.json", [1, 2])
        git("add", ".")
        git("commit", "-qm", "the first run")
        git("tag", "old")
        git("update-ref", "refs/exps/ab/cdef/stern-goat", "old")
        compare.PARAMS.write_text("pretrain: {epochs: 9, lr: 0.5}\nviews: {size: 32, flip: 0.5}\n")
        files.write_json(files.REPORTS / "evaluate.json", NEW)
        files.write_json(files.REPORTS / "export.json", {"space": "two", "dim": 512})
        for name in ("loss", "std", "added"):
            (pages.CURVES / f"{name}.tsv").unlink(missing_ok=True)  # a link into the cache, maybe
            (pages.CURVES / f"{name}.tsv").write_text(f"step\t{name}\n0\t8\n1\t4\n2\t2\n")
        yield root


@pytest.fixture(autouse=True)
def inside(repository, monkeypatch):
    monkeypatch.chdir(repository)


def rows(html):
    """Return the text of each table row's cells."""
    found = []
    for row in re.findall(r"<tr.*?</tr>", html, re.S):
        cells = re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S)
        found.append([" ".join(re.sub(r"<.*?>", " ", cell).split()) for cell in cells])
    return found


@pytest.mark.parametrize("name", ["old", "stern-goat"])
def test_two_runs_side_by_side(name, capsys):
    compare.run(name)
    html = compare.PAGE.read_text()
    found = rows(html)
    assert git("rev-parse", "old") in html
    assert "the first run" in html
    assert ["pretrain.epochs", "8", "9"] in found
    assert ["views.flip", "–", "0.5"] in found
    assert not any(row[0] in ("pretrain.lr", "views.size") for row in found)
    assert ["linear: top1", "50 47.0 to 53.0", "60.5 57.0 to 63.0", "+10.5", "apart"] in found
    assert ["knn: top1", "40", "40", "0", ""] in found
    assert ["classes", "10", "–", "", ""] in found
    assert ["health: uniformity", "–", "−2.5", "", ""] in found
    assert ["space", "one", "two", "", ""] in found
    lines = [len(points.split()) for points in re.findall(r'<polyline.*?points="([\d., ]+)"', html)]
    assert lines == [2, 2, 2, 3, 2, 3]  # two in the key; loss and std, of both runs
    assert "Not drawn: added." in html
    assert not re.search(r"<script|<link|https?://", html)
    assert str(compare.PAGE) in capsys.readouterr().out


def test_overlapping_intervals_are_called_so():
    old, new = {"top1": 1.0, "low": 0.0, "high": 2.0}, {"top1": 2.5, "low": 2.0, "high": 3.0}
    [row] = compare.rows({"a": old}, {"a": new})
    assert row["key"] == "a.top1"
    assert row["overlap"]
    assert row["difference"] == 1.5


def test_curves_that_are_not_in_the_cache_are_missing_and_no_error(repository, tmp_path):
    cache = repository / ".dvc/cache"
    shutil.move(cache, tmp_path / "cache")
    try:
        compare.run("old")
        html = compare.PAGE.read_text()
        assert "Not drawn: added, loss, std." in html
        assert "dvc fetch" in html
        assert "linear: top1" in html
    finally:
        shutil.move(tmp_path / "cache", cache)


def test_errors_name_the_revision():
    for name in ("nowhere", "--help"):
        with pytest.raises(UserError, match=f"{name} is neither a git revision nor a DVC experiment"):
            compare.run(name)
    with pytest.raises(UserError, match=r"first has no reports/evaluate\.json"):
        compare.run("first")


def test_a_folder_without_metrics(tmp_path, monkeypatch):
    path = files.REPORTS / "evaluate.json"
    before = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(UserError, match=r"this folder has no reports/evaluate\.json"):
            compare.run("old")
    finally:
        path.write_bytes(before)


def test_metrics_of_an_older_shape_are_not_compared(monkeypatch):
    path = files.REPORTS / "evaluate.json"
    before = path.read_bytes()
    try:
        for text, message in {
            '{"linear_top1": 80.0}': "this folder has metrics of an older shape",
            "{": "not whole JSON",
        }.items():
            path.write_text(text)
            with pytest.raises(UserError, match=message):
                compare.run("old")
    finally:
        path.write_bytes(before)


def test_outside_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="not in a git repository"):
        compare.run("HEAD")
