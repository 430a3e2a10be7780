import io
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import wds2idx
from nvidia.dali import fn, pipeline_def, types
from pyarrow import parquet

from barlow.core import files, webdataset
from barlow.core.errors import UserError

SAMPLES = [
    webdataset.Sample(f"{i:024x}", bytes([i]) * (300 * i), ("jpg", "png", "webp")[i % 3], i - 1, 5 + i, 70_000 - i)
    for i in range(7)
]


@pytest.fixture
def tar(tmp_path):
    path = tmp_path / "shards" / "train-000000.tar"
    webdataset.write(path, SAMPLES)
    return path


def test_read_returns_what_was_written(tar):
    assert list(webdataset.read([tar, tar])) == SAMPLES + SAMPLES
    assert webdataset.count([tar, tar]) == 14


@pytest.fixture
def three_tars(tar):
    """Three tars: one with two samples, one with none, one with the rest."""
    parts = [SAMPLES[:2], [], SAMPLES[2:]]
    for i, part in enumerate(parts):
        webdataset.write(tar.with_name(f"pretrain-{i:06d}.tar"), part)
    return webdataset.tars("pretrain", tar.parent)


def test_samples_are_those_of_read_by_number(three_tars):
    samples = webdataset.Samples(three_tars)
    expected = list(webdataset.read(three_tars))
    assert len(samples) == len(expected) == webdataset.count(three_tars) == 7
    assert [data.tobytes() for data in samples.read(np.arange(7))] == [sample.data for sample in expected]
    some = np.array([6, 0, 2, 2, 1])
    assert [data.tobytes() for data in samples.read(some)] == [expected[i].data for i in some]
    assert samples.read(some)[0].dtype == np.uint8
    assert samples.sides.tolist() == [[sample.height, sample.width] for sample in expected]
    assert samples.sides.dtype == np.int32
    assert samples.labels().tolist() == [sample.label for sample in expected]
    assert samples.bytes == sum(len(sample.data) for sample in expected)


def test_samples_of_more_tars_than_are_kept_open(three_tars, monkeypatch):
    monkeypatch.setattr(webdataset, "OPEN_TARS", 1)
    samples = webdataset.Samples(three_tars)
    for _ in range(3):
        samples.prefetch(np.array([6, 1, 5]))
        held = samples.read(np.array([6, 1, 5, 0]))
        assert [data.tobytes() for data in held] == [SAMPLES[i].data for i in (6, 1, 5, 0)]


def test_no_samples(three_tars):
    for tars in ([], three_tars[1:2]):
        samples = webdataset.Samples(tars)
        assert (len(samples), samples.bytes, samples.sides.shape) == (0, 0, (0, 2))


def test_index_is_byte_for_byte_that_of_wds2idx(tar, tmp_path):
    with wds2idx.IndexCreator(str(tar), str(tmp_path / "oracle.idx"), verbose=False) as creator:
        creator.create_index()
    assert webdataset.index(tar).read_bytes() == (tmp_path / "oracle.idx").read_bytes()


def test_tarfile_reads_the_members_and_finds_no_trace_of_time_or_user(tar):
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
        assert [m.name for m in members[:2]] == [f"{SAMPLES[0].key}.jpg", f"{SAMPLES[0].key}.cls"]
        assert [archive.extractfile(m).read() for m in members[::2]] == [s.data for s in SAMPLES]
        assert [archive.extractfile(m).read() for m in members[1:4:2]] == [b"\xff\xff\xff\xff", b"\0\0\0\0"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert tar.stat().st_size % 512 == 0


def test_dali_reads_images_and_labels_through_the_index(tar):
    @pipeline_def
    def pipeline():
        reader = {"paths": str(tar), "index_paths": str(webdataset.index(tar)), "ext": ["jpg;png;webp", "cls"]}
        return tuple(fn.readers.webdataset(**reader, dtypes=[types.UINT8, types.INT32]))

    data, labels = pipeline(batch_size=len(SAMPLES), num_threads=1, device_id=None).run()
    assert [bytes(np.asarray(tensor)) for tensor in data] == [s.data for s in SAMPLES]
    assert np.asarray(labels.as_tensor()).ravel().tolist() == [s.label for s in SAMPLES]


def test_the_same_samples_give_the_same_bytes(tar, tmp_path):
    webdataset.write(tmp_path / "again.tar", iter(SAMPLES))
    assert (tmp_path / "again.tar").read_bytes() == tar.read_bytes()
    for suffix in (".idx", ".npy"):
        assert (tmp_path / "again.tar").with_suffix(suffix).read_bytes() == tar.with_suffix(suffix).read_bytes()


def test_sides_are_a_plain_array_beside_the_tar(tar):
    sides = np.load(tar.with_suffix(".npy"), allow_pickle=False)
    assert sides.dtype == np.int32
    assert sides.tolist() == [[sample.height, sample.width] for sample in SAMPLES]


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def broken():
        yield SAMPLES[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        webdataset.write(tmp_path / "train-000000.tar", broken())
    assert list(tmp_path.iterdir()) == []


def test_tars_are_those_of_the_split_in_order(tar):
    for name in ("train-000010", "train-000002", "pretrain-000000"):
        webdataset.write(tar.with_name(f"{name}.tar"), SAMPLES[:1])
    assert [t.name for t in webdataset.tars("train", tar.parent)] == [f"train-0000{i}.tar" for i in ("00", "02", "10")]
    assert webdataset.tars("val", tar.parent) == []


def test_sources_are_the_accepted_paths_by_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert webdataset.sources() == {}
    files.ACCEPTED.parent.mkdir()
    rows = {"path": ["a.png", "b/c.jpg"], "sha256": [64 * "0", 32 * "1f"]}
    parquet.write_table(pa.table(rows), files.ACCEPTED)
    assert webdataset.sources() == {24 * "0": "a.png", 12 * "1f": "b/c.jpg"}


def test_classes(tar):
    files.write_json(tar.with_name("classes.json"), ["a", "ü"])
    assert webdataset.classes(tar.parent) == ["a", "ü"]


@pytest.mark.parametrize("other", [SAMPLES[1:], SAMPLES[::-1], [s._replace(key="f" * 24) for s in SAMPLES]])
def test_digest_tells_content_and_order(tar, tmp_path, other):
    webdataset.write(tmp_path / tar.name, SAMPLES)
    assert webdataset.digest([tmp_path / tar.name]) == webdataset.digest([tar])
    webdataset.write(tmp_path / tar.name, other)
    assert webdataset.digest([tmp_path / tar.name]) != webdataset.digest([tar])


def both(tar):
    """The two ways to read a tar, each to its end."""
    return (lambda: list(webdataset.read([tar])), lambda: webdataset.Samples([tar]).read(np.array([0, 6])))


def test_damage_is_named(tar):
    tar.write_bytes(tar.read_bytes()[:-3000])
    for read in both(tar):
        with pytest.raises(
            UserError, match=r"train-000000.tar is shorter than train-000000.idx says; run `barlow shard`"
        ):
            read()
    webdataset.index(tar).write_text("v1.2 9\njpg 512 3 a.jpg cls 1536 4 a.cls\n")
    with pytest.raises(UserError, match=r"train-000000.idx is damaged: 1 samples after 'v1.2 9'"):
        webdataset.count([tar])
    with pytest.raises(UserError, match=r"train-000000.idx is damaged"):
        webdataset.Samples([tar])
    webdataset.index(tar).write_text("")
    with pytest.raises(UserError, match=r"train-000000.idx is damaged: 0 samples after ''"):
        webdataset.count([tar])
    webdataset.index(tar).unlink()
    with pytest.raises(UserError, match=r"train-000000.idx is missing; run `barlow shard`"):
        webdataset.count([tar])
    with pytest.raises(UserError, match=r"train-000000.idx is missing; run `barlow shard`"):
        webdataset.Samples([tar])


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


SIDES = np.ones((7, 2), np.int32)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, r"is missing; run `barlow shard`"),
        (b"", r"is damaged: .*; run `barlow shard` again"),
        (b"I am a text.\n", r"is damaged: .*; run `barlow shard` again"),
        (npy(SIDES)[:-1], r"is damaged: .*; run `barlow shard` again"),
        (npy(SIDES)[:60], r"is damaged: .*; run `barlow shard` again"),
        (npy(SIDES.astype(object)), r"is damaged: .*; run `barlow shard` again"),
        (npy(SIDES[1:]), r"is damaged: int32 of shape \(6, 2\) for 7 samples; run `barlow shard` again"),
        (npy(SIDES.ravel()), r"is damaged: int32 of shape \(14,\) for 7 samples; run `barlow shard` again"),
        (npy(SIDES.astype(np.int64)), r"is damaged: int64 of shape \(7, 2\) for 7 samples; run `barlow shard` again"),
    ],
)
def test_damaged_sides_are_named(tar, content, why):
    sides = tar.with_suffix(".npy")
    sides.unlink()
    if content is not None:
        sides.write_bytes(content)
    for read in both(tar):
        with pytest.raises(UserError, match=rf"train-000000.npy {why}"):
            read()
