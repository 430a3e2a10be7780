import dataclasses
from pathlib import Path

import pytest
import yaml

from barlow.core.errors import UserError
from barlow.experiments import grid
from barlow.settings import editing, loading, strict
from barlow.settings import params as settings

ROOT = Path(__file__).parents[2]
INPUTS = {"sections": ["model", "pretrain"], "code": "1", "shards": "2"}
RULE = {"compare": ["64"], "against": "32", "difference": "above", "points": -5, "text": "..."}
CLAIM = {"name": "batch", "title": "t", "claim": "c", "x_label": "x", "rule": RULE}
POINTS = [{"label": "32", "params": {"pretrain.batch_size": 32}}, {"label": "64", "params": {}}]
SMALL = {"data": "synthetic", "seeds": [0, 1], "base": {"pretrain.epochs": 2}, "claims": [CLAIM | {"points": POINTS}]}


@pytest.fixture
def params(monkeypatch):
    monkeypatch.chdir(ROOT)
    return loading.load()


@pytest.fixture
def load(params, tmp_path, monkeypatch):
    """`load(document)` reads it as presets/claims/small.yaml."""
    monkeypatch.chdir(tmp_path)
    grid.FOLDER.mkdir(parents=True)

    def load(document):
        (grid.FOLDER / "small.yaml").write_text(yaml.safe_dump(document))
        return grid.load("small", params)

    return load


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_presets_are_valid_and_their_base_is_a_point_of_every_claim(params, name):
    if name == "gpu":
        document = yaml.safe_load((ROOT / "params.yaml").read_text())
        list(editing.merge(document, yaml.safe_load((ROOT / "presets/cifar10.yaml").read_text())))
        document["pretrain"]["epochs"] = 200
        params = strict.build(settings.Params, document, "cifar10")
    plan = grid.load(name, params)
    base = grid.apply(params, plan.base, "")
    assert len(plan.seeds) >= 3
    for claim in plan.claims:
        assert base in [grid.apply(params, plan.base | point.params, "") for point in claim.points], claim.name
    if name == "gpu":  # the recipe, but for epochs, when checkpoints are, and what the claims do not read
        document["pretrain"]["checkpoint_seconds"], document["evaluate"]["draws"] = 100_000, 0
        document["extract"]["baselines"] = False
        assert base == document


def test_the_cpu_preset_has_51_experiments(params):
    plan = grid.load("cpu", params)
    named = {
        grid.name("cpu", grid.apply(params, grid.overrides(plan, point, seed), ""), INPUTS | {"sections": list(base)})
        for base in [dataclasses.asdict(params)]
        for claim in plan.claims
        for point in claim.points
        for seed in plan.seeds
    }
    assert sum(len(claim.points) for claim in plan.claims) == 22
    assert len(named) == 17 * 3


def test_an_experiment_sets_base_point_and_seeds(load, params):
    plan = load(SMALL)
    values = grid.overrides(plan, plan.claims[0].points[0], 1)
    assert values == {"pretrain.epochs": 2, "pretrain.batch_size": 32, "pretrain.seed": 1}
    document = grid.apply(params, values, "")
    assert (document["pretrain"]["epochs"], document["pretrain"]["batch_size"]) == (2, 32)
    assert document["pretrain"]["seed"] == 1
    assert document["views"] == grid.apply(params, {}, "")["views"]


def test_a_name_follows_from_all_that_is_read_and_nothing_else(params):
    def name(inputs=INPUTS, prefix="claims-cpu", **values):
        document = grid.apply(params, {key.replace("__", "."): value for key, value in values.items()}, "")
        return grid.name(prefix, document, inputs)

    assert name().startswith("claims-cpu-")
    assert name(pretrain__seed=3).endswith("-s3")
    assert name() == name(pretrain__batch_size=64)  # as params.yaml has it
    assert name() == name(report__images=3)  # no stage of the experiment reads that
    changed = [name(pretrain__batch_size=32), name(model__arch="resnet18"), name(INPUTS | {"shards": "3"})]
    changed += [name(INPUTS | {"code": "2"}), name(prefix="tune"), name(pretrain__seed=1)]
    assert len({name(), *changed}) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "seeds=[] is not allowed; it must be a list of at least one value"),
        ({"base": 3}, "base=3 is not allowed; it must be a section of `key: value` lines"),
        ({"bases": {}}, "bases is not a known key; the nearest is base"),
        ({"data": "elsewhere"}, "small.yaml is for ingest.source=elsewhere, and params.yaml has synthetic; set it"),
        (
            {"base": {"pretrain.epoch": 2}},
            "batch, 32: pretrain.epoch=2 is not a known key; the nearest is pretrain.epochs",
        ),
        ({"base": {"pretain.epochs": 2}}, "batch, 32: pretain is not a known key"),
        ({"base": {"pretrain.batch_size": 0.5}}, "batch, 64: pretrain.batch_size=0.5 is not allowed"),
        ({"claims": [SMALL["claims"][0]] * 2}, "claims have 'batch' twice"),
        ({"claims": [CLAIM | {"points": POINTS * 2}]}, "the points of batch have '32' twice"),
        ({"claims": [CLAIM | {"points": POINTS[:1]}]}, "the rule of batch names '64'; its points are 32"),
    ],
)
def test_what_is_wrong_is_named(load, change, message):
    with pytest.raises(UserError) as error:
        load(SMALL | change)
    assert f"{grid.FOLDER}/small.yaml" in str(error.value)
    assert message in str(error.value)


def test_bad_yaml_and_an_unknown_preset(load, params):
    load(SMALL)
    (grid.FOLDER / "small.yaml").write_text("claims: [")
    with pytest.raises(UserError, match=r"small.yaml is not valid YAML"):
        grid.load("small", params)
    with pytest.raises(UserError, match="preset 'large' is not in presets/claims/; there are: small"):
        grid.load("large", params)


def test_claims_are_chosen_by_name(load):
    second = CLAIM | {"name": "other", "points": POINTS}
    plan = load(SMALL | {"claims": [*SMALL["claims"], second]})
    assert [claim.name for claim in grid.choose(plan, [])] == ["batch", "other"]
    assert [claim.name for claim in grid.choose(plan, ["other"])] == ["other"]
    with pytest.raises(UserError, match="claim 'batches' is not known; there are: batch, other"):
        grid.choose(plan, ["batches"])
