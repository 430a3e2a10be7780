import pyarrow as pa
import pytest

from barlow.data import overview


def rows(*groups):
    """Rows of the manifest from (number, split, label, columns)."""
    return pa.Table.from_pylist(
        [
            {"path": f"{i}/{j}.jpg", "split": split, "label": label, "error": None, "greys": 200} | columns
            for i, (n, split, label, columns) in enumerate(groups)
            for j in range(n)
        ],
        pa.schema([(name, pa.string()) for name in ("path", "split", "label", "error")] + [("greys", pa.int16())]),
    )


@pytest.fixture
def warn(smoke, change):
    def warn(table, *named):
        return overview.warnings(table, list(named), change(smoke, "ingest", source="photos").ingest)

    return warn


def test_the_table_counts_classes_by_split():
    table = rows(
        (3, "train", "cat", {}), (1, "test", "cat", {}), (5, "train", "dog", {}), (7, "pretrain", None, {}),
    )  # fmt: skip
    assert overview.table(table) == [
        "  class       pretrain     train      test",
        "  dog                0         5         0",
        "  cat                0         3         1",
        "  (no label)         7         0         0",
        "  sum                7         8         1",
    ]
    assert overview.table(rows((2, "pretrain", None, {}))) == [
        "  class       pretrain",
        "  (no label)         2",
    ]


def test_many_classes_are_summed_up_and_long_names_cut():
    table = rows(*((20 - i, "train", f"{'x' * 40}{i:02}", {}) for i in range(13)))
    lines = overview.table(table)
    assert len(lines) == 1 + 10 + 1 + 1
    assert lines[1].split() == ["x" * 27 + "...", "20"]
    assert lines[-2].split() == ["3", "more", "classes", str(10 + 9 + 8)]
    assert lines[-1].split() == ["sum", str(sum(range(8, 21)))]


def test_clean_rows_give_no_warning(warn):
    splits = [(9, split, label, {}) for split in ("train", "val", "test") for label in ("cat", "dog")]
    assert (
        warn(rows(*splits))
        == warn(rows(*splits), "train", "val", "test")
        == warn(rows((9, "pretrain", None, {})))
        == []
    )


@pytest.mark.parametrize(
    ("groups", "named", "said"),
    [
        (
            [(9, "train", "cat", {}), (9, "val", "cat", {})],
            [],
            "no labelled image in test, so no accuracy will be measured; add labelled images, or raise "
            "ingest.val_fraction=0.05 and ingest.test_fraction=0.15, or, if there is nothing to classify, set "
            "ingest.labels: none",
        ),
        (
            [(9, "train", "cat", {}), (9, "val", "cat", {}), (4, "test", None, {})],
            ["train", "val", "test"],
            "leave the test images without labels out with ingest.exclude; val is then taken as test",
        ),
        ([(9, "train", "cat", {})], ["train"], "add val and test to the splits that the source names"),
        ([(9, "train", "cat", {}), (9, "test", "cat", {})], ["train", "test"], "or raise ingest.val_fraction=0.05"),
        (
            [(9, "train", f"2024-06-{i:02}", {}) for i in range(1, 31)]
            + [(2, s, "2024-06-01", {}) for s in ("val", "test")],
            [],
            ": 29 of 30 classes have no image in val (2024-06-02, 2024-06-03, 2024-06-04, ...); 29 of 30 classes have "
            "no image in test (2024-06-02, 2024-06-03, 2024-06-04, ...); add images or raise ingest.val_fraction=0.05 "
            "and ingest.test_fraction=0.15, leave the classes out with ingest.exclude, or, if there is nothing to "
            "classify, set ingest.labels: none",
        ),
        (
            [(9, s, label, {}) for s in ("train", "val") for label in ("cat", "dog")] + [(9, "test", "cat", {})],
            ["train", "val", "test"],
            ": 1 of 2 classes have no image in test (dog); add images, leave the classes out",
        ),
    ],
)
def test_labels_that_give_no_accuracy_are_told(warn, groups, named, said):
    (line,) = warn(rows(*groups), *named)
    assert line.startswith("warning: photos")
    assert said in line


def test_masks_among_photographs_are_told(warn):
    masks = [{"path": f"x{i}_mask.jpg", "greys": 2, "split": "pretrain", "error": None} for i in range(4)]
    table = pa.concat_tables([rows((4, "pretrain", None, {})), pa.Table.from_pylist(masks, rows().schema)])
    assert warn(table) == [
        "warning: photos: 4 of 8 images have at most 16 grey values, for example x0_mask.jpg: masks? leave them out "
        "with ingest.exclude"
    ]
    assert warn(table.slice(4)) == []  # all alike: a set of drawings
    assert warn(table.slice(0, 6)) == []  # two are no population


def named(*paths):
    values = [{"path": path, "greys": 99, "split": "pretrain", "error": None} for path in paths]
    return pa.Table.from_pylist(values, rows().schema)


def test_another_suffix_in_every_folder_is_told(warn):
    paths = [f"{folder}/{i}.{suffix}" for folder in "ab" for i in range(3) for suffix in ("jpg", "png")]
    assert warn(named(*paths, "a/7.JPEG")) == [
        "warning: photos: 6 of 13 images are .png, and every folder has some, for example a/0.png: another kind of "
        "image? leave them out with ingest.exclude"
    ]
    assert warn(named(*paths, "c/0.jpg")) == []
    assert warn(named(*[path for path in paths if path.endswith("jpg")])) == []
