import copy
import re

import pytest
import yaml

from barlow.core.errors import UserError
from barlow.settings import loading


@pytest.fixture
def document(request):
    return yaml.safe_load((request.config.rootpath / "params.yaml").read_text())


def load(tmp_path, document):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(document))
    return loading.load(path)


def test_the_shipped_file_is_read(tmp_path, document):
    loaded = load(tmp_path, document)
    assert loaded.pretrain.lambd == document["pretrain"]["lambd"]
    assert loaded.views.blur == tuple(document["views"]["blur"])
    assert loaded.shard.max_side is None


@pytest.mark.parametrize("key", ["checkpoint_steps", "knn_epochs", "processes", "microbatch"])
@pytest.mark.parametrize("value", [None, 4, 32])
def test_what_may_be_left_out_is_null_or_a_number(tmp_path, document, key, value):
    document["pretrain"][key] = value
    assert getattr(load(tmp_path, document).pretrain, key) == value


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("pretrain", "epochs", 0, "pretrain.epochs=0 is not allowed; it must be at least 1"),
        ("pretrain", "epochs", 1.5, "pretrain.epochs=1.5 is not allowed; it must be a whole number"),
        ("pretrain", "epochs", True, "pretrain.epochs=True"),
        ("pretrain", "momentum", 1.5, "pretrain.momentum=1.5 is not allowed; it must be from 0 to 1"),
        ("pretrain", "lambd", "5e-3", "write 1.0e-6"),
        ("pretrain", "lambd", float("nan"), "pretrain.lambd=nan is not allowed; it must be a number"),
        ("model", "arch", "resnet81", "did you mean resnet18?"),
        ("model", "arch", "vit_tiny_patch16_224", "must be one of resnet10, resnet18, resnet34, resnet50, timm:*"),
        ("model", "arch", 18, "model.arch=18 is not allowed; it must be a text that is not empty; put it in quotes"),
        ("model", "arch", "timm:test_vit", "model.arch=timm:test_vit has a stem of its own; set model.stem: imagenet"),
        ("model", "channels", 0, "model.channels=0 is not allowed; it must be from 1 to 16"),
        ("model", "channels", 17, "model.channels=17 is not allowed; it must be from 1 to 16"),
        ("model", "channels", 4, "views.mean has 3 values, and the images have model.channels=4; give one value"),
        ("model", "bits", 12, "model.bits=12 is not allowed; it must be one of 8, 16"),
        ("model", "bits", "8", "model.bits='8' is not allowed; it must be one of 8, 16"),
        ("views", "std", [0.2, 0.2], "views.std has 2 values, and the images have model.channels=3; give one value"),
        ("views", "blur", [0.5], "views.blur=[0.5] is not allowed; it must be a list of 2 values"),
        ("views", "blur", [0.5, 2], "views.blur[1]=2 is not allowed; it must be from 0 to 1"),
        ("views", "crop_area", [1.0, 0.3], "views.crop_area=[1.0, 0.3] is not in ascending order; write [0.3, 1.0]"),
        ("model", "projector", [], "model.projector=[] is not allowed; it must be a list of at least one value"),
        ("ingest", "source", "", "ingest.source='' is not allowed; it must be a text that is not empty"),
        (
            "pretrain",
            "warmup_epochs",
            6,
            "warmup_epochs=6 is not below pretrain.epochs=6, so the learning rate would never",
        ),
        ("ingest", "test_fraction", 0.97, "is 1.02, which leaves no images to train on; lower one of them"),
        ("pretrain", "compile", 1, "pretrain.compile=1 is not allowed; it must be true or false"),
        ("pretrain", "compile", "yes", "pretrain.compile='yes' is not allowed; it must be true or false"),
        ("pretrain", "compile", None, "pretrain.compile=None is not allowed; it must be true or false"),
        ("pretrain", "checkpoint_steps", 0, "pretrain.checkpoint_steps=0 is not allowed; it must be at least 1"),
        (
            "pretrain",
            "checkpoint_steps",
            2.5,
            "pretrain.checkpoint_steps=2.5 is not allowed; it must be a whole number",
        ),
        ("pretrain", "knn_epochs", 0, "pretrain.knn_epochs=0 is not allowed; it must be at least 1"),
        ("pretrain", "processes", 0, "pretrain.processes=0 is not allowed; it must be at least 1"),
        ("pretrain", "min_std", -0.1, "pretrain.min_std=-0.1 is not allowed; it must be from 0 to 1"),
        ("pretrain", "max_correlation", 1.1, "pretrain.max_correlation=1.1 is not allowed; it must be from 0 to 1"),
        ("pretrain", "epoch", 3, "pretrain.epoch=3 is not a known key; the nearest is pretrain.epochs"),
        ("pretrain", "optimizer", "adam", "one of lars, larc, sgd, adamw; did you mean adamw?"),
        ("pretrain", "microbatch", 1, "pretrain.microbatch=1 is not allowed; it must be at least 2"),
        ("pretrain", "microbatch", "auto", "pretrain.microbatch='auto' is not allowed; it must be a whole number"),
    ],
)
def test_an_impossible_value_is_one_line(tmp_path, document, section, key, value, message):
    document[section][key] = value
    with pytest.raises(UserError) as error:
        load(tmp_path, document)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "params.yaml" in str(error.value)


@pytest.mark.parametrize("name", ["test_vit", "a wrong name, which pretrain tells"])
def test_a_model_of_timm_has_no_settings_of_the_resnets(tmp_path, document, name):
    document["model"] |= {"arch": f"timm:{name}", "stem": "imagenet"}
    assert load(tmp_path, document).model.arch == f"timm:{name}"
    document["model"]["zero_init_residual"] = True
    with pytest.raises(UserError, match=f"not for model.arch=timm:{name}; set it to false"):
        load(tmp_path, document)


@pytest.mark.parametrize("given", ["models/encoder.safetensors", "./models/encoder.safetensors"])
def test_what_pretrain_writes_is_not_what_it_starts_from(tmp_path, document, given):
    document["model"]["weights"] = given
    with pytest.raises(
        UserError, match=r"model\.weights=.* DVC deletes it .*; copy it, cp models/encoder\.safetensors"
    ) as e:
        load(tmp_path, document)
    assert "\n" not in str(e.value)
    document["model"]["weights"] = "data/start.safetensors"
    assert load(tmp_path, document).model.weights == "data/start.safetensors"


def test_every_missing_key_is_named(tmp_path, document):
    for section, keys in document.items():
        for key in keys:
            broken = copy.deepcopy(document)
            del broken[section][key]
            with pytest.raises(UserError, match=rf"{section}\.{key} is missing"):
                load(tmp_path, broken)


def test_a_missing_section_and_a_section_that_is_none(tmp_path, document):
    with pytest.raises(UserError, match="views is missing"):
        load(tmp_path, {name: value for name, value in document.items() if name != "views"})
    with pytest.raises(UserError, match="views=None"):
        load(tmp_path, document | {"views": None})


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "not valid YAML"), ("", "the file=None"), ("- 1", r"the file=\[1\]")]
)
def test_a_file_that_is_no_mapping(tmp_path, content, message):
    path = tmp_path / "params.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        loading.load(path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="run from the project's root"):
        loading.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("batch_size", "processes", "microbatch", "message"),
    [
        (64, None, 48, "microbatch=48 does not divide the 64 images that .* 1 process.*; set it to 32, or to null$"),
        (64, 4, 12, "microbatch=12 does not divide the 16 images that .* 4 process.*; set it to 8, or to null$"),
        (64, None, 100, "microbatch=100 is more than the 64 images that .*; set it to 32, or to null$"),
        (61, None, 20, "microbatch=20 does not divide the 61 images that .*; set it to null$"),
    ],
)
def test_a_microbatch_that_does_not_fit_is_told_with_one_that_does(
    tmp_path, document, batch_size, processes, microbatch, message
):
    document["pretrain"] |= {"batch_size": batch_size, "processes": processes, "microbatch": microbatch}
    with pytest.raises(UserError, match=rf"params\.yaml: pretrain\.{message}") as error:
        load(tmp_path, document)
    if remedy := re.search(r"set it to (\d+)", str(error.value)):
        document["pretrain"]["microbatch"] = int(remedy[1])
        load(tmp_path, document)


def test_adamws_momentum_is_below_one(tmp_path, document):
    document["pretrain"] |= {"optimizer": "adamw", "momentum": 1.0}
    with pytest.raises(UserError, match=r"pretrain\.momentum=1, which is beta1 .* must be below 1; 0\.9 is usual$"):
        load(tmp_path, document)


@pytest.mark.parametrize("value", [True, False])
def test_a_setting_that_is_gone_is_told_with_what_replaces_it(tmp_path, document, value):
    document["pretrain"]["clip"] = value
    wanted = "`optimizer: larc` in place of true, or `optimizer: lars` in place of false"
    with pytest.raises(UserError, match=rf"params\.yaml: pretrain\.clip={value} is gone; write {wanted}$"):
        load(tmp_path, document)
    document["views"]["clip"] = document["pretrain"].pop("clip")  # only where it was
    with pytest.raises(UserError, match=r"views\.clip=.* is not a known key"):
        load(tmp_path, document)


def test_the_old_name_of_a_section_is_told_with_its_new_one(tmp_path, request):
    text = (request.config.rootpath / "params.yaml").read_text().replace("ingest:\n", "data:\n", 1)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=r"params\.yaml: data is called ingest now; rename it$"):
        loading.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", ["saturation", "hue", "grayscale"])
def test_colours_are_for_three_channels(tmp_path, document, name):
    document["model"]["channels"] = 1
    still = {"mean": [0.5], "std": [0.25], "saturation": 0, "hue": 0, "grayscale": 0}
    document["views"] |= still
    assert load(tmp_path, document).views.mean == (0.5,)
    document["views"][name] = 0.25
    text = f"views.{name}=0.25: needs three channels, and the images have model.channels=1; set to 0"
    with pytest.raises(UserError, match=re.escape(text)):
        load(tmp_path, document)
