import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from barlow.core.errors import UserError
from barlow.data import lists


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def csv(tmp_path, text):
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    return lists.read(tmp_path / "list.csv")


@pytest.mark.parametrize(
    "head",
    [
        "path,label,split",
        "path, label, split",
        " Path ,LABEL,Split",
        "filename,labels,subset",
        "file,class,set",
        "Image,Category,Partition",
        "File Name,class_name,splits",
        "image-path,target,split",
        "\ufeffpath,label,split",
    ],
)
def test_columns_by_other_names(tmp_path, head):
    columns, (note,) = csv(tmp_path, f"{head}\na.png,cat,train\nb.png,dog,Testing\n")
    assert columns == {"path": ["a.png", "b.png"], "label": ["cat", "dog"], "split": ["train", "test"]}
    names = head.strip("\ufeff").split(",")
    assert note == ", ".join(f"{r} from the column {n}" for r, n in zip(["path", "label", "split"], names, strict=True))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("path,path,label", r"has the column path twice \(path, path\); remove one"),
        ("path,label,label", r"has the column label twice \(label, label\); remove one"),
        ("path,Label, label", r"has the column Label twice \(Label,  label\); remove one"),
        ("file,image,label", "the columns file, image could each be the path; rename one to path"),
        ("path,class,category", "the columns class, category could each be the label; rename one to label"),
        ("path,lable,note", "has no column `label`, but the column lable; rename it to label"),
        ("path,class_id,note", "has no column `label`, but the column class_id; rename it to label"),
        ("pth,label,note", "has no column `path`, but the column pth; rename it to path"),
        ("path,label,spilt", "has no column `split`, but the column spilt; rename it to split"),
        ("x,y,z", "has no column `path`, only x, y, z; rename one"),
    ],
)
def test_columns_that_are_not_clear_are_refused_by_name(tmp_path, head, message):
    with pytest.raises(UserError, match=message):
        csv(tmp_path, f"{head}\na.png,x,y\n")


def test_a_list_with_other_separators_is_refused_with_the_remedy(tmp_path):
    for separator in (";", "\t", "|"):
        with pytest.raises(UserError, match=r"it separates columns with .*; separate them with commas"):
            csv(tmp_path, f"path{separator}label\na.png{separator}x\n")


@pytest.mark.parametrize("text", ["étiquette,path\nx,a.png\n", "path,label\na.png,café\n"])
def test_a_list_that_is_not_utf8_says_so(tmp_path, text):
    (tmp_path / "list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"is it not UTF-8\? Save it as CSV UTF-8"):
        lists.read(tmp_path / "list.csv")


def test_the_columns_own_name_comes_first_and_the_rest_is_told(tmp_path):
    columns, notes = csv(tmp_path, "id,class,label,filename,path\n7,x,cat,y,a.png\n")
    assert columns == {"path": ["a.png"], "label": ["cat"], "split": [None]}
    assert notes == ["path from the column path, label from the column label; not used: id, class, filename"]


MISSING = ["", " ", "NaN", "nan", "NA", "N/A", "null", "None", " NA "]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_values_are_none_in_csv_and_parquet_alike(tmp_path, kind):
    paths, labels = [f"{i}.png" for i in range(len(MISSING) + 1)], [*MISSING, "none"]
    table = pa.table({"path": paths, "label": labels, "split": [*MISSING, "val"]})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "list.parquet")
    else:
        text = "".join(
            f"{path},{label},{label if label != 'none' else 'val'}\n" for path, label in zip(paths, labels, strict=True)
        )
        (tmp_path / "list.csv").write_text("path,label,split\n" + text)
    columns, notes = lists.read(tmp_path / f"list.{kind}")
    assert columns["label"] == [None] * len(MISSING) + ["none"]
    assert columns["split"] == [None] * len(MISSING) + ["val"]
    assert notes[1] == "taken for no label: NaN 1, nan 1, NA 2, N/A 1, null 1, None 1"


def test_missing_numbers_in_parquet(tmp_path):
    labels = pa.array([float("nan"), 1.0, 2.0, None])
    pq.write_table(pa.table({"path": list("abcd"), "label": labels}), tmp_path / "list.parquet")
    assert lists.read(tmp_path / "list.parquet")[0]["label"] == [None, "1", "2", None]


def test_columns_with_one_name_in_parquet(tmp_path):
    table = pa.table([["a"], ["x"], ["y"]], names=["path", "label", "label"])
    pq.write_table(table, tmp_path / "list.parquet")
    with pytest.raises(UserError, match="has the column label twice"):
        lists.read(tmp_path / "list.parquet")


def test_blanks_around_values(tmp_path):
    for name in (" kept.png", "both.png", " both.png"):
        (tmp_path / name).write_bytes(b"")
    columns, _ = csv(tmp_path, "path, label\n a.png , cat\nb.png,cat \n kept.png,new york\n both.png,x\n")
    assert columns["path"] == ["a.png", "b.png", " kept.png", "both.png"]
    assert columns["label"] == ["cat", "cat", "new york", "x"]


def test_a_path_that_differs_by_blanks_only_is_listed_twice(tmp_path):
    with pytest.raises(UserError, match=r"lists a\.png more than once"):
        csv(tmp_path, "path\na.png\n a.png\n")


def test_a_label_that_is_no_text(tmp_path):
    pq.write_table(pa.table({"path": ["a"], "label": [[1, 2]]}), tmp_path / "list.parquet")
    with pytest.raises(UserError, match="cannot be read as a table"):
        lists.read(tmp_path / "list.parquet")
