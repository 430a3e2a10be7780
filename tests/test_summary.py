import pytest
import stages

from barlow import summary
from barlow.core import files
from barlow.core.errors import UserError


def test_it_says_where_the_report_lies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"reports/evaluate.json is missing"):
        summary.run()
    stages.evaluation(["a", "b"], 10, labelled=True)
    files.REPORT.write_text("x")
    summary.run()
    out = capsys.readouterr().out
    assert "supervised, all labels" in out
    files.FINETUNING.unlink()
    summary.run()
    assert "supervised" not in capsys.readouterr().out
    assert "reports/index.html" in out
    assert "\nPretraining paid: " in out
    assert "steps" not in out
    files.write_json(files.PRETRAINING, {"steps": 12, "epochs": 3})
    summary.run()
    assert "\nnote: 12 steps are few: " in capsys.readouterr().out
    assert "not there" in out  # the encoder
