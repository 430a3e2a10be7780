import hashlib
import http.server
import inspect
import io
import pickle
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from barlow.core.errors import UserError
from barlow.data import sources, torchvision_sets


def batch(rng, labels):
    return {"data": rng.integers(0, 256, (len(labels), 3 * 32 * 32), dtype=np.uint8), "labels": labels}


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Serve a CIFAR-10 archive of 3 images per batch on 127.0.0.1; yield its batches and the requests."""
    rng = np.random.default_rng(0)
    batches = {f"data_batch_{i}": batch(rng, [i, 0, 9]) for i in range(1, 6)} | {"test_batch": batch(rng, [3, 4, 5])}
    contents = {name: pickle.dumps(value) for name, value in batches.items()}
    contents["batches.meta"] = pickle.dumps({"label_names": [f"class/{i}" for i in range(10)]})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    archive, requests = buffer.getvalue(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = "Method" not in self.headers  # torchvision looks for redirects first, with this odd header
            requests.extend([self.path] * wanted)
            self.send_response(200)
            self.send_header("Content-Length", str(len(archive)))
            self.end_headers()
            if wanted:
                self.wfile.write(archive[: len(archive) // 2 if len(requests) == 1 else None])

        def log_message(self, *arguments):
            pass

    def md5(content):
        return hashlib.md5(content).hexdigest()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        kind = datasets.CIFAR10
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
        monkeypatch.setattr(kind, "tgz_md5", md5(archive))
        monkeypatch.setattr(
            kind, "train_list", [[f"data_batch_{i}", md5(contents[f"data_batch_{i}"])] for i in range(1, 6)]
        )
        monkeypatch.setattr(kind, "test_list", [["test_batch", md5(contents["test_batch"])]])
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(contents["batches.meta"])})
        yield batches, requests
        server.shutdown()
        thread.join()


def test_cifar10_is_fetched_checked_resumed_and_written_without_loss(tmp_path, cifar10):
    batches, requests = cifar10
    with pytest.raises(
        UserError, match=r"^ingest.source=torchvision:CIFAR10 could not be fetched: .*; run again to resume"
    ):
        torchvision_sets.write("torchvision:CIFAR10", tmp_path / "raw")  # the first answer is cut off
    assert not (tmp_path / "raw").exists()
    (torchvision_sets.DOWNLOAD / "CIFAR10/cifar-10-batches-py").mkdir()
    (torchvision_sets.DOWNLOAD / "CIFAR10/cifar-10-batches-py/test_batch").write_bytes(b"half")
    (torchvision_sets.DOWNLOAD / "CIFAR10/half.jpg").touch()

    torchvision_sets.write("torchvision:CIFAR10", tmp_path / "raw")
    names = sorted(path.relative_to(tmp_path / "raw").as_posix() for path in (tmp_path / "raw").rglob("*.png"))
    assert len(names) == 18
    assert names[:2] == ["test/class_3/00000.png", "test/class_4/00001.png"]
    assert {name.split("/")[1] for name in names if name.startswith("train")} == {
        f"class_{i}" for i in (0, 1, 2, 3, 4, 5, 9)
    }
    pixels = np.asarray(Image.open(tmp_path / "raw/train/class_2/00003.png"))
    assert np.array_equal(pixels.transpose(2, 0, 1).ravel(), batches["data_batch_2"]["data"][0])
    assert len(requests) == 2
    assert not (torchvision_sets.DOWNLOAD / "CIFAR10/half.jpg").exists()

    torchvision_sets.write("torchvision:CIFAR10", tmp_path / "again")
    assert len(requests) == 2


def test_what_was_cut_off_while_unpacking_is_removed_and_archives_stay(tmp_path):
    for name in ("set.tgz", "dtd/dtd.tar.gz", "dtd/images/half.jpg", "eurosat/2750/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    torchvision_sets._drop_extracted(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "dtd",
        "dtd/dtd.tar.gz",
        "set.tgz",
    ]


@pytest.mark.parametrize("name", torchvision_sets.SETS)
def test_every_set_takes_the_arguments_that_we_give(name):
    kind = getattr(datasets, name)
    parents = [cls.__init__ for cls in kind.__mro__ if "__init__" in vars(cls)]
    for arguments in torchvision_sets.SETS[name].values():
        for argument in ["download", *arguments]:
            assert any(argument in inspect.signature(init).parameters for init in parents)
        if "split" in arguments:
            with pytest.raises((ValueError, RuntimeError), match=r"Unknown value|h5py"):
                kind(root="nowhere", **arguments | {"split": "no such split"})
            with pytest.raises((RuntimeError, ModuleNotFoundError), match=r"ot found|No module"):
                kind(root="nowhere", **arguments)


def test_unlabelled_images_and_missing_class_names(tmp_path, monkeypatch):
    class Set:
        def __init__(self, root, split, download):
            self.items = [(Image.new("L", (4, 4), i), -1 if split == "unlabeled" else np.int64(i)) for i in range(2)]

        def __len__(self):
            return len(self.items)

        def __getitem__(self, i):
            return self.items[i]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "STL10", Set)
    torchvision_sets.write("torchvision:STL10", tmp_path / "raw")
    assert sorted(path.relative_to(tmp_path / "raw").as_posix() for path in (tmp_path / "raw").rglob("*.png")) == [
        "test/0/00000.png",
        "test/1/00001.png",
        "train/0/00000.png",
        "train/1/00001.png",
        "unlabeled/unlabelled/00000.png",
        "unlabeled/unlabelled/00001.png",
    ]


def test_unknown_set_names_the_nearest():
    with pytest.raises(UserError, match=r"torchvision:cifar is not a known set; the nearest are CIFAR10"):
        torchvision_sets.check("torchvision:cifar")


@pytest.mark.parametrize("name", ["CLEVRClassification", "Imagenette"])
def test_a_set_of_train_and_val_gets_a_test_split(tmp_path, monkeypatch, smoke, change, name):
    class Set:
        classes = ("cat", "dog")

        def __init__(self, root, split, download):
            self.items = [(Image.new("L", (4, 4), i), i % 2) for i in range(4)]

        def __len__(self):
            return len(self.items)

        def __getitem__(self, i):
            return self.items[i]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, name, Set)
    p = change(smoke, "ingest", source=f"torchvision:{name}").ingest
    sources.prepare(p)
    table, notes = sources.find(p)
    assert {row["path"].partition("/")[0]: row["split"] for row in table.to_pylist()} == {
        "train": "train",
        "val": "test",
    }
    assert ["val is taken as test" in note for note in notes] == [True]  # ingest draws a new val from train
    classes = change(smoke, "ingest", source=p.source, labels="classes").ingest
    assert sources.find(classes)[0] == table  # the setting is about folders of the user
