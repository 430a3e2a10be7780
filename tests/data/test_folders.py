import pytest

from barlow.core.errors import UserError
from barlow.data import folders


def understand(*names, labels="folders"):
    paths = [tuple(name.split("/")) if name else () for name in names]
    layout = folders.understand(paths, "photos", labels)
    return {"/".join(path): meaning for path, meaning in layout.meanings.items()}, layout.notes


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "train") for name in ("train", "Training", "seg_train", "train_images", "images-train", "trainset")),
        *((name, "train") for name in ("TrainImages", "training set", "train2017", "Train_Data")),
        *((name, "test") for name in ("test", "Testing", "seg_test", "testset", "test_images")),
        *((name, "val") for name in ("val", "valid", "validation", "dev", "eval", "Val_set")),
        ("pretrain", "pretrain"),
        *(
            (name, None)
            for name in ("cat", "test_tube", "trained", "contest", "invalid", "images", "set", "", "trainA")
        ),
    ],
)
def test_the_split_that_a_name_stands_for(name, split):
    assert folders.split_of(name) == split


@pytest.mark.parametrize(
    ("names", "meanings"),
    [
        (("", "cat", "dog/deep"), [(None, None), (None, "cat"), (None, "dog")]),
        (
            ("Testing/a", "Testing/b", "Training/a", "Training/b"),
            [("test", "a"), ("test", "b"), ("train", "a"), ("train", "b")],
        ),
        (
            ("seg_test/sea", "seg_test/ice", "seg_train/sea", "seg_train/ice"),
            [("test", "ice"), ("test", "sea"), ("train", "ice"), ("train", "sea")],
        ),
        (  # each archive holds its own name again
            ("seg_test/seg_test/ice", "seg_test/seg_test/sea", "seg_train/seg_train/ice", "seg_train/seg_train/sea"),
            [("test", "ice"), ("test", "sea"), ("train", "ice"), ("train", "sea")],
        ),
        (("test_images", "train_images"), [("test", None), ("train", None)]),
        (("pretrain/cat", "pretrain/dog", "train/cat"), [("pretrain", None), ("pretrain", None), ("train", "cat")]),
        (("cat", "unlabelled/test", "dog"), [(None, "cat"), (None, "dog"), ("pretrain", None)]),
        (
            ("test/control", "test/test", "train/control", "train/test"),
            [("test", "control"), ("test", "test"), ("train", "control"), ("train", "test")],
        ),
        (("train/unlabelled", "train/cat"), [("train", "cat"), ("train", None)]),
        (("train/cat/test",), [("train", "cat")]),
        (("cat",), [(None, "cat")]),
    ],
)
def test_layouts_that_are_clear(names, meanings):
    assert list(dict(sorted(understand(*names)[0].items())).values()) == meanings


def test_folders_that_are_no_plain_split_are_told():
    assert understand("Testing/a", "train/a")[1] == ["folders taken as splits: Testing = test"]
    assert understand("test/a", "Train/a")[1] == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("airplane", "car", "train"), "train/ is named like a split, but airplane/, car/ beside it are not"),
        (("control", "test"), "test/ is named like a split, but control/ beside it is not"),
        (("valid", "invalid"), "valid/ is named like a split, but invalid/ beside it is not"),
        (("seg_pred", "seg_test/a", "seg_train/a"), "leave seg_pred/ out with ingest.exclude, or list the images"),
        (
            ("bottle/train/good", "bottle/test/broken", "bottle/ground_truth/broken", "cable/train/good"),
            "bottle/test is named like a split, below a folder",
        ),
        (("cat/train", "dog/train"), "cat/train is named like a split, below a folder"),
        (("a/b/test", "c/b/x"), "a/b/test is named like a split, below a folder"),
        (("train/cat", "train/val"), "train/val is named like a split, below another split"),
        (("train/control", "train/test", "test/control"), "train/test is named like a split, below another split"),
        (
            ("archive/train/cat", "archive/test/cat"),
            "test/, train/ lie in archive/; set ingest.source to photos/archive",
        ),
        (("archive/data/train/cat", "archive/data/test/cat", "unlabelled"), "set ingest.source to photos/archive/data"),
        (
            ("archive/cat", "archive/dog"),
            "so its name is no label. .* set ingest.source to photos/archive; if there are",
        ),
    ],
)
def test_layouts_that_are_ambiguous_stop_with_two_ways(names, message):
    with pytest.raises(UserError, match=rf"^ingest\.source=photos: .*{message}") as error:
        understand(*names)
    ways = (
        "ingest.labels: classes",
        "columns path, split and label",
        "set ingest.source to",
        "ingest.labels: none",
        "move it up",
    )
    assert sum(way in str(error.value) for way in ways) >= 2
    assert "\n" not in str(error.value)


def test_each_top_folder_is_a_class_if_so_set():
    meanings = understand("airplane", "train", "cable/test/bad", "unlabelled/a", "", labels="classes")[0]
    assert meanings == {
        "": (None, None),
        "airplane": (None, "airplane"),
        "train": (None, "train"),
        "cable/test/bad": (None, "cable"),
        "unlabelled/a": ("pretrain", None),
    }


def test_without_labels_nothing_stops_and_plain_names_are_splits():
    meanings = understand("cat/train", "test", "test_images", labels="none")[0]
    assert {name: split for name, (split, _) in meanings.items()} == {
        "cat/train": None,
        "test": "test",
        "test_images": None,
    }
    assert understand("archive/cat", "archive/dog", labels="none")[0]["archive/cat"][0] is None


@pytest.mark.parametrize(
    "names",
    [
        ("trainA", "trainB", "testA", "testB"),
        ("train_cats", "train_dogs", "test_cats", "test_dogs"),
        ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1-2_Test_Input"),
    ],
)
def test_splits_with_something_else_in_their_names_stop(names):
    with pytest.raises(UserError, match="have a split in their names, and something else"):
        understand(*names)
    assert understand(*names, labels="classes")[0][names[0]] == (None, names[0])
    assert understand("train_station", "airport")[0]["airport"] == (None, "airport")  # one split is none
