from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from barlow.core.errors import UserError
from barlow.settings import strict


@dataclass(frozen=True)
class Inner:
    """A section."""

    count: Annotated[int, strict.Range(1, 5)]
    name: str | None


@dataclass(frozen=True)
class Outer:
    """The whole."""

    inner: Inner
    kind: Literal["red", "green"]
    pair: tuple[float, float]
    several: tuple[str, ...]
    on: bool


WHOLE = {"inner": {"count": 2, "name": None}, "kind": "red", "pair": [1, 2.5], "several": ["a"], "on": True}


def test_values_become_the_annotated_types():
    built = strict.build(Outer, WHOLE, "file")
    assert built == Outer(Inner(2, None), "red", (1.0, 2.5), ("a",), True)
    assert isinstance(built.pair[0], float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {"count": 6, "name": None}}, "file: inner.count=6 is not allowed; it must be from 1 to 5"),
        ({"inner": {"count": 2}}, "file: inner.name is missing; A section. Its keys: count, name"),
        ({"inner": {"count": 2, "name": ""}}, "file: inner.name='' is not allowed; it must be a text"),
        ({"kind": "gren"}, "file: kind='gren' is not allowed; it must be one of red, green; did you mean green?"),
        ({"pair": [1]}, "file: pair=[1] is not allowed; it must be a list of 2 values"),
        ({"several": []}, "file: several=[] is not allowed; it must be a list of at least one value"),
        ({"on": 1}, "file: on=1 is not allowed; it must be true or false"),
        ({"kinds": "red"}, "file: kinds='red' is not a known key; the nearest is kind"),
    ],
)
def test_what_is_wrong_is_one_line(change, message):
    with pytest.raises(UserError) as error:
        strict.build(Outer, WHOLE | change, "file")
    assert str(error.value) == message


def test_a_file_that_is_missing_or_no_yaml(tmp_path):
    with pytest.raises(UserError, match="is missing; run from the project's root"):
        strict.read_yaml(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not valid YAML"):
        strict.read_yaml(tmp_path / "broken.yaml")
