import pytest

from barlow.core import files
from barlow.core.errors import UserError
from barlow.data import validation
from barlow.data.validation import Check, Counts, Validation

EXAMPLE = Validation(
    104,
    Counts(100, {"train": 60, "test": 40}),
    Counts(4, {"width": 4}),
    {"width": Check(True, "critical", 0.96, 0.9, 4)},
)


def test_what_is_written_is_read_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    validation.write(EXAMPLE)
    assert validation.read() == EXAMPLE
    document = files.read_json("reports/validate.json")
    assert document["accepted"] == {"total": 100, "by": {"train": 60, "test": 40}}
    assert document["checks"]["width"]["observed"] == 0.96


def test_another_shape_is_named_with_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_json(files.VALIDATION, {"images": 104, "accepted": 100})
    with pytest.raises(UserError, match=r"reports/validate\.json: quarantined is missing"):
        validation.read()
