import shutil
from pathlib import Path

import pytest

from barlow.core.errors import UserError
from barlow.settings import editing, loading


@pytest.fixture(autouse=True)
def project(request, tmp_path, monkeypatch):
    shutil.copy(request.config.rootpath / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)


def lines():
    return Path("params.yaml").read_text().splitlines()


def test_values_change_and_nothing_else_does():
    before = lines()
    told = editing.edit({"pretrain": {"epochs": 30, "seed": 0}, "views": {"crop_area": [0.2, 1.0]}}, "me")
    assert told == ["pretrain.epochs: 6 -> 30", "views.crop_area: [0.3, 1.0] -> [0.2, 1.0]"]
    changed = [(old, new) for old, new in zip(before, lines(), strict=True) if old != new]
    assert [old.partition("#")[2] for old, _ in changed] == [new.partition("#")[2] for _, new in changed]
    assert len(changed) == 2
    assert (loading.load().pretrain.epochs, loading.load().views.crop_area) == (30, (0.2, 1.0))


def test_a_note_is_above_its_setting_and_goes_with_the_next_edit_of_it():
    before = lines()
    editing.edit({}, "me", {"pretrain.seed": "0: why not", "views.size": "32: small", "promote.margin": "3.0: last"})
    for key, note in {"seed: 0": "0: why not", "size: 32": "32: small", "margin: 3.0": "3.0: last"}.items():
        # `seed` is in other sections as well, and has a note in none of these
        [place] = [i for i, line in enumerate(lines()) if line == f"  # recommended {note}"]
        assert lines()[place + 1].startswith(f"  {key}")
    assert [line for line in lines() if "# recommended " not in line] == before

    editing.edit({"views": {"size": 32}}, "me")  # the note goes, though the value is the same
    assert [line.split()[2] for line in lines() if "# recommended " in line] == ["0:", "3.0:"]
    editing.edit({"pretrain": {"seed": 1}}, "me", {"pretrain.seed": "1: another"})
    assert [line for line in lines() if "# recommended " in line] == [
        "  # recommended 1: another",
        "  # recommended 3.0: last",
    ]


@pytest.mark.parametrize("overlay", [{"pretrain": {"epochs": 0}}, {"pretrain": {"epoch": 3}}, {"pretrain": 3}])
def test_what_would_not_be_valid_is_not_written(overlay):
    before = lines()
    with pytest.raises(UserError, match=r"^with me, params\.yaml: pretrain"):
        editing.edit(overlay, "me", {"pretrain.seed": "0: why not"})
    assert lines() == before
    assert [path.name for path in Path().iterdir()] == ["params.yaml"]


def test_dotted_keys_become_sections():
    assert editing.nested({"a.b": 1, "c.d": [2], "a.e": None}) == {"a": {"b": 1, "e": None}, "c": {"d": [2]}}
