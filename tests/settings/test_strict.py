from dataclasses import dataclass
from typing import Annotated, Any, Literal

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
        ({"inner": {"count": 2}}, "file: inner.name is missing; the keys of inner are count, name"),
        (
            {"inner": {"count": 2, "name": ""}},
            "file: inner.name='' is not allowed; it must be a text that is not empty",
        ),
        (
            {"inner": {"count": 2, "name": 1}},
            "file: inner.name=1 is not allowed; it must be a text that is not empty; put it in quotes",
        ),
        ({"kind": "gren"}, "file: kind='gren' is not allowed; it must be one of red, green; did you mean green?"),
        ({"pair": [1]}, "file: pair=[1] is not allowed; it must be a list of 2 values"),
        ({"pair": [1, 2, 3]}, "file: pair=[1, 2, 3] is not allowed; it must be a list of 2 values"),
        (
            {"pair": [1, "1e-6"]},
            "file: pair[1]='1e-6' is not allowed; it must be a number (YAML reads 1e-6 as a text; write 1.0e-6)",
        ),
        ({"several": []}, "file: several=[] is not allowed; it must be a list of at least one value"),
        ({"on": 1}, "file: on=1 is not allowed; it must be true or false"),
        ({True: 1}, "file: the key True=True is not allowed; it must be a text; put it in quotes"),
        ({"kinds": "red"}, "file: kinds='red' is not a known key; the nearest is kind"),
    ],
)
def test_what_is_wrong_is_one_line(change, message):
    with pytest.raises(UserError) as error:
        strict.build(Outer, WHOLE | change, "file")
    assert str(error.value) == message


def test_a_misspelt_key_is_told_as_unknown_and_not_as_missing():
    inner = {"count": 2, "nam": None}
    with pytest.raises(UserError, match=r"inner\.nam=None is not a known key; the nearest is inner\.name"):
        strict.build(Outer, WHOLE | {"inner": inner}, "file")


def test_a_dict_has_any_keys_and_values_of_one_kind():
    sections = {"a": {"count": 1, "name": "x"}, "b": {"count": 2, "name": None}}
    assert strict.build(dict[str, Inner], sections, "file") == {"a": Inner(1, "x"), "b": Inner(2, None)}
    assert strict.build(dict[str, Any], {"a": [1, None]}, "file") == {"a": [1, None]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"count": 0, "name": None}}, "file: all.a.count=0 is not allowed; it must be from 1 to 5"),
        ({"a": {"count": 1}}, "file: all.a.name is missing; the keys of all.a are count, name"),
        ({"a": 3}, "file: all.a=3 is not allowed; it must be a section of `key: value` lines"),
        ([], "file: all=[] is not allowed; it must be a section of `key: value` lines"),
        ({1: {}}, "file: the key all.1=1 is not allowed; it must be a text; put it in quotes"),
    ],
)
def test_what_is_wrong_in_a_dict_is_one_line(value, message):
    with pytest.raises(UserError) as error:
        strict.build(dict[str, Inner], value, "file", "all")
    assert str(error.value) == message


def test_a_file_that_is_missing_or_no_yaml(tmp_path):
    with pytest.raises(UserError, match="is missing; run from the project's root"):
        strict.read_yaml(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not valid YAML"):
        strict.read_yaml(tmp_path / "broken.yaml")
