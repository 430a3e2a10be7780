from dataclasses import fields, replace

import pytest

from barlow.cli import parser
from barlow.core.errors import UserError
from barlow.settings.flags import Flags

NAMES = [field.name for field in fields(Flags)]


def test_the_defaults_are_allowed():
    Flags().check()


@pytest.mark.parametrize("name", NAMES)
def test_impossible_values_are_refused_by_the_name_of_the_flag(name):
    least = 0 if name == "max_queue_delay_us" else 1
    replace(Flags(), **{name: least}).check()
    flag = f"--{name.replace('_', '-')}"
    for value in (least - 1, -100):
        with pytest.raises(UserError, match=f"^{flag} {value} is not allowed; it must be at least {least}$"):
            replace(Flags(), **{name: value}).check()


def test_each_setting_is_a_flag_with_its_default_in_the_help(capsys):
    given = [text for i, name in enumerate(NAMES) for text in (f"--{name.replace('_', '-')}", str(1000 + i))]
    arguments = vars(parser().parse_args(["serve", *given]))
    assert [arguments[name] for name in NAMES] == [1000 + i for i in range(len(NAMES))]
    defaults = vars(parser().parse_args(["serve"]))
    assert Flags(**{name: defaults[name] for name in NAMES}) == Flags()
    with pytest.raises(SystemExit):
        parser().parse_args(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(Flags):
        assert f"{field.metadata['help']} (default {field.default})" in text


def test_a_setting_never_changes():
    with pytest.raises(AttributeError):
        Flags().max_queue = 1
