import pytest

from barlow import promote, rollback
from barlow.core import files
from barlow.core.errors import UserError
from barlow.encoder.registry import Registry


@pytest.fixture
def three(encoders):
    """Three versions, the last in production; returns the settings and the bytes of each encoder.onnx."""
    content = {}
    for i, name in enumerate(("edges", "other", "edges"), 1):
        encoders(name, classes=("a", "b", "c", "d") if i < 3 else ("a", "b", "c"))
        promote.run(encoders.params)
        content[f"v{i}"] = files.ONNX.read_bytes()
    return encoders.params, content


@pytest.fixture
def encoders(encoders, change):
    encoders.params = change(encoders.params, "promote", allow_other_classes=True)
    return encoders


@pytest.fixture
def held():
    return Registry("models/registry")


def test_it_restores_the_earlier_file_byte_for_byte(three, held, capsys):
    params, content = three
    assert held.production().onnx.read_bytes() == content["v3"]
    rollback.run(params)
    assert "rolled back: v2 is in production, v3 is withdrawn" in capsys.readouterr().out
    assert held.production().onnx.read_bytes() == content["v2"]
    rollback.run(params)
    assert held.production().onnx.read_bytes() == content["v1"]
    assert list(held.withdrawn()) == ["v2", "v3"]
    with pytest.raises(UserError, match="models/registry has no intact version before v1"):
        rollback.run(params)


def test_a_version_by_name_and_forward_again(three, held, capsys):
    params, content = three
    rollback.run(params, "v1")
    assert held.production().onnx.read_bytes() == content["v1"]
    rollback.run(params, "v3")
    assert held.production().onnx.read_bytes() == content["v3"]
    assert list(held.withdrawn()) == ["v1"]
    rollback.run(params, "v3")
    assert "v3 is in production already" in capsys.readouterr().out
    entries = [files.read_json(path) for path in sorted(held.folder.glob("log/*-rolled-back.json"))]
    assert [(entry["production"], entry["withdrawn"]) for entry in entries] == [("v1", "v3"), ("v3", "v1")]


def test_a_damaged_version_is_passed_over_or_refused(three, held):
    params, content = three
    held.version("v2").onnx.unlink()
    with pytest.raises(UserError, match="v2 is damaged"):
        rollback.run(params, "v2")
    rollback.run(params)
    assert held.production().onnx.read_bytes() == content["v1"]


def test_away_from_a_version_that_is_gone(three, held):
    params, content = three
    held.production().path.rename(held.folder / "lost")
    with pytest.raises(UserError, match="`barlow rollback VERSION`"):
        rollback.run(params)
    rollback.run(params, "v2")
    assert held.production().onnx.read_bytes() == content["v2"]


def test_there_is_nothing_or_not_that(three, held, change):
    params, _ = three
    with pytest.raises(UserError, match="models/registry has no version v9; it has: v1, v2, v3"):
        rollback.run(params, "v9")
    with pytest.raises(UserError, match="nothing is in production in elsewhere"):
        rollback.run(change(params, "promote", registry="elsewhere"))
