import dataclasses
import typing

import pytest
import yaml

from barlow.core.errors import UserError
from barlow.settings import params, strict


@pytest.fixture
def document(request):
    return yaml.safe_load((request.config.rootpath / "params.yaml").read_text())


def test_every_dataclass_is_frozen_and_without_defaults():
    for kind in vars(params).values():
        if dataclasses.is_dataclass(kind) and kind is not strict.Range:
            assert kind.__dataclass_params__.frozen
            assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(kind))


def test_presets_name_known_keys_only(request, document):
    for path in (request.config.rootpath / "presets").glob("*.yaml"):
        for section, overlay in yaml.safe_load(path.read_text()).items():
            hints = typing.get_type_hints(typing.get_type_hints(params.Params)[section])
            assert overlay.keys() <= hints.keys(), path


def test_patterns_are_a_list_that_may_be_empty(smoke, document):
    assert (smoke.ingest.include, smoke.ingest.exclude) == ((), ())
    document["ingest"]["exclude"] = ["*_mask.png"]
    assert strict.build(params.Params, document, "file").ingest.exclude == ("*_mask.png",)
    for value in ("*.png", [1], [""]):
        document["ingest"]["exclude"] = value
        with pytest.raises(UserError, match=r"ingest\.exclude.* is not allowed"):
            strict.build(params.Params, document, "file")
