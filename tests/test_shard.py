import hashlib
import io

import hostile
import numpy as np
import pyarrow as pa
import pytest
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from barlow import ingest, shard, validate
from barlow.core import dali, files, images, webdataset
from barlow.core.errors import UserError
from barlow.core.images import encode
from barlow.data import manifest


def picture(seed=0, width=57, height=41, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def source(data, path="x", split="pretrain", label=-1):
    """The Source of an image file, with the facts that ingest finds."""
    image = images.open_image(data)
    pixels = images.digest(images.decode(data))
    facts = (pixels, image.format, image.mode, image.width, image.height, len(data))
    return shard.Source(path, hashlib.sha256(data).hexdigest(), *facts, split, label)


@pytest.fixture(scope="module")
def decoder():
    with dali.Decoder() as decoder:
        yield decoder


@pytest.fixture
def sample(decoder):
    """`sample(source, root)` is the sample of one image."""

    def sample(source, root, max_side=None):
        (packed,) = shard.samples([source], root, max_side, [decoder], [])
        return packed

    return sample


def dali_decode(data):
    @pipeline_def
    def pipeline():
        return fn.decoders.image(fn.external_source(lambda: [np.frombuffer(data, np.uint8)]), output_type=types.RGB)

    (tensors,) = pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1).run()
    return np.asarray(tensors[0])


def upright(data):
    """Height and width by Pillow alone."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size[::-1]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """`data(rows)` makes a project with images (path, split, class) and returns the files' bytes by path."""
    monkeypatch.chdir(tmp_path)

    def make(rows):
        content = {path: encode(picture(i), "JPEG") for i, (path, _, _) in enumerate(rows)}
        table = []
        for path, split, name in rows:
            (files.RAW / path).parent.mkdir(parents=True, exist_ok=True)
            (files.RAW / path).write_bytes(content[path])
            row = dict.fromkeys(manifest.SCHEMA.names) | source(content[path], path, split)._asdict() | {"label": name}
            table.append(row)
        manifest.write(pa.Table.from_pylist(table, manifest.SCHEMA), files.ACCEPTED)
        return content

    return make


ROWS = [(f"u/{i}.jpg", "pretrain", None) for i in range(12)]
ROWS += [(f"{split}/{i}.jpg", split, "ab"[i % 2]) for split in ("train", "val", "test") for i in range(4)]


def test_run_packs_each_split(data, smoke):
    content = data([*ROWS, ("test/none.jpg", "test", None)])
    files.SHARDS.mkdir()
    (files.SHARDS / "pretrain-000007.tar").touch()  # of an earlier run
    shard.run(smoke)

    names = ["classes.json"] + [
        f"{split}-000000.{suffix}" for split in manifest.SPLITS for suffix in ("tar", "idx", "npy")
    ]
    assert sorted(path.name for path in files.SHARDS.iterdir()) == sorted(names)
    assert [path.name for path in files.SHARDS.parent.iterdir() if path.name.startswith(".")] == []
    assert webdataset.classes() == ["a", "b"]

    paths = {hashlib.sha256(image).hexdigest()[:24]: path for path, image in content.items()}
    packed = {split: list(webdataset.read(webdataset.tars(split))) for split in manifest.SPLITS}
    assert all(sample.data == content[paths[sample.key]] for split in packed.values() for sample in split)
    labels = {split: {paths[sample.key]: sample.label for sample in packed[split]} for split in packed}
    unlabelled = [path for path, split, _ in ROWS if split in ("pretrain", "train")]
    assert labels["pretrain"] == dict.fromkeys(unlabelled, -1)
    for split in ("train", "val"):
        assert labels[split] == {f"{split}/{i}.jpg": i % 2 for i in range(4)}
    assert labels["test"] == {f"test/{i}.jpg": i % 2 for i in range(4)} | {"test/none.jpg": -1}
    assert [len(split) for split in packed.values()] == [16, 4, 4, 5]


def test_run_without_labels(data, smoke):
    data(ROWS[:3])
    shard.run(smoke)
    assert webdataset.classes() == []
    assert [webdataset.count(webdataset.tars(split)) for split in manifest.SPLITS] == [3, 0, 0, 0]


def test_any_number_of_processes_writes_the_same_bytes(data, smoke, change, monkeypatch):
    data(ROWS)
    digests = []
    for processes in (1, 3):
        monkeypatch.setattr(files, "cpus", lambda n=processes: n)
        shard.run(change(smoke, "shard", max_bytes=4000))
        digests.append({path.name: files.sha256(path) for path in files.SHARDS.iterdir()})
    assert len(digests[0]) > 12
    assert digests[0] == digests[1]


def sources(n=200, size=1000):
    hashes = [hashlib.sha256(bytes([i])).hexdigest() for i in range(n)]
    return [
        shard.Source(f"{i}.jpg", sha256, 0, "JPEG", "RGB", 32, 32, size, "pretrain", -1)
        for i, sha256 in enumerate(hashes)
    ]


def test_order_is_a_permutation_of_the_seed_alone():
    (a,), (b,), (other,) = (
        shard.plan(members, seed, 10**9).values()
        for members, seed in [(sources(), 0), (reversed(sources()), 0), (sources(), 1)]
    )
    assert a == b
    assert a != other
    assert set(a) == set(other) == set(sources())
    ranks = np.argsort(np.argsort([s.sha256 for s in a]))
    assert abs(np.corrcoef(ranks, np.arange(200))[0, 1]) < 0.2
    assert abs(np.corrcoef(ranks, np.argsort(np.argsort([int(s.path[:-4]) for s in a])))[0, 1]) < 0.2


def test_a_tar_holds_at_most_max_bytes_or_one_image():
    tars = shard.plan([*sources(10), sources(11)[10]._replace(bytes=9000)], 0, 3500)
    sizes = [[s.bytes for s in tar] for tar in tars.values()]
    assert sum(map(len, sizes)) == 11
    assert all(sum(tar) <= 3500 or tar == [9000] for tar in sizes)
    assert len(sizes) <= 6
    assert list(tars) == [f"pretrain-{i:06d}.tar" for i in range(len(sizes))]
    assert len(shard.plan(sources(10), 0, 10_000)) == 1


def cases():
    for mode in ("L", "RGB"):
        yield "keep", f"jpeg-{mode}", encode(picture(mode=mode), "JPEG", quality=85)
        yield (
            "keep",
            f"jpeg-{mode}-progressive-444",
            encode(picture(mode=mode), "JPEG", progressive=True, subsampling=0),
        )
        yield "keep", f"png-{mode}", encode(picture(mode=mode), "PNG")
        yield "keep", f"webp-{mode}", encode(picture(mode=mode), "WEBP")
        yield "keep", f"webp-{mode}-lossless", encode(picture(mode=mode), "WEBP", lossless=True)
        yield "change", f"bmp-{mode}", encode(picture(mode=mode), "BMP")
        yield "change", f"tiff-{mode}-lzw", encode(picture(mode=mode), "TIFF", compression="tiff_lzw")
    yield "keep", "mpo", encode(picture(), "MPO", save_all=True, append_images=[picture(1)])
    yield "keep", "webp-animated", encode(picture(), "WEBP", save_all=True, append_images=[picture(1)])
    yield "keep", "png-16", encode(Image.fromarray(np.arange(0, 60000, 20, dtype=np.uint16).reshape(50, 60)), "PNG")
    transparent = picture()
    transparent.putalpha(picture(1, mode="L"))
    yield "keep", "webp-RGBA", encode(transparent, "WEBP")
    yield "keep", "png-RGBA", encode(transparent, "PNG")
    for mode in ("LA", "P", "1"):
        yield "keep", f"PNG-{mode}", encode(picture(mode=mode), "PNG")
    yield "change", "JPEG-CMYK", encode(picture(mode="CMYK"), "JPEG")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form in ("JPEG", "PNG", "WEBP", "TIFF"):
            action = "change" if form == "TIFF" else "keep"
            yield action, f"{form}-exif-{orientation}", encode(picture(), form, exif=exif)
    for orientation in (3, 6):  # Pillow rotates these, DALI does not
        xmp = hostile.XMP % orientation
        yield "change", f"JPEG-xmp-{orientation}", encode(picture(), "JPEG", xmp=xmp)
        yield "change", f"WEBP-xmp-{orientation}", encode(picture(), "WEBP", xmp=xmp)
        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        yield "change", f"PNG-xmp-{orientation}", encode(picture(), "PNG", pnginfo=text)


@pytest.mark.parametrize(("action", "data"), [pytest.param(a, d, id=name) for a, name, d in cases()])
def test_dali_decodes_what_is_packed_to_the_pixels_of_images_decode(action, data, tmp_path, sample):
    (tmp_path / "x").write_bytes(data)
    key, packed, extension, _, height, width = sample(source(data), tmp_path, None)
    assert (packed == data) == (action == "keep")
    assert key == hashlib.sha256(data).hexdigest()[:24]
    form = Image.open(io.BytesIO(packed)).format
    assert {"jpg": ("JPEG", "MPO"), "png": ("PNG",), "webp": ("WEBP",)}[extension].count(form) == 1
    np.testing.assert_array_equal(dali_decode(packed), images.decode(data))
    assert (height, width) == dali_decode(packed).shape[:2] == upright(packed)


@pytest.fixture(scope="module")
def odd():
    """One file of each kind of `hostile`, in its largest size."""
    return {file.kind: file for file in hostile.make()}


REFUSED_BY_DALI = [
    "jpg junk between segments", "jpg ff00 between segments", "jpg APP14 of 11 bytes", "png no IEND",
    "png cut by 4", "png wrong CRC of IDAT", "png rows missing", "png unknown critical chunk",
]  # fmt: skip
WRITTEN_ANEW = [
    "jpg EXIF twice, 6 then 1", "jpg EXIF twice, 1 then 6", "jpg EXIF twice, none then 6", "jpg Exif-0-0 twice",
    "jpg another tag with two values", "jpg orientation as BYTE", "webp lossy, Exif-0-0, 6",
    "webp lossless, Exif-0-0, 3", "png Exif-0-0 before it", "png APNG with a default image", "png 16-bit RGB",
    "png 16-bit RGB + alpha", "jpg CMYK without APP14", "jpg YCCK",
]  # fmt: skip
ALIKE = [
    "jpg lossless process", "jpg restart markers", "jpg 4:1:1", "jpg EXIF 6 big-endian", "png interlaced",
    "png 4-bit palette, tRNS", "webp lossy, 1 x 3", "webp lossless, alpha", "jpg EXIF of junk", "png EXIF of junk",
    "webp lossy, EXIF of junk",
]  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_BY_DALI + WRITTEN_ANEW + ALIKE)
def test_an_odd_file_is_kept_only_if_dali_decodes_it_as_pillow_does(kind, odd, sample, tmp_path):
    file = odd[kind]
    (tmp_path / "x").write_bytes(file.data)
    packed = sample(source(file.data), tmp_path)
    assert (packed.data == file.data) == (kind in ALIKE)
    expected = images.decode(file.data)
    np.testing.assert_array_equal(dali_decode(packed.data), expected)
    assert (packed.height, packed.width) == expected.shape[:2]
    if file.upright is not None:
        np.testing.assert_array_equal(expected, file.upright)


def dali_decode_all(contents):
    """Pixels by DALI, in the order of `contents`."""
    batches = [[np.frombuffer(data, np.uint8) for data in contents[i : i + 50]] for i in range(0, len(contents), 50)]

    @pipeline_def
    def pipeline():
        return fn.decoders.image(fn.external_source(iter(batches)), output_type=types.RGB)

    built = pipeline(batch_size=50, num_threads=1, device_id=None, prefetch_queue_depth=1)
    return [np.array(pixels) for batch in batches for pixels in list(built.run()[0])[: len(batch)]]


def test_each_of_hundreds_of_hostile_files_is_seen_alike_or_refused_by_name(
    smoke, change, tmp_path, monkeypatch, capsys
):
    """The oracles: the pixels that a file was made of, where known, and both decoders."""
    made = {file.name: file for file in hostile.make()}
    assert len(made) >= 500
    monkeypatch.chdir(tmp_path)
    for name, file in made.items():
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(file.data)
    params = change(smoke, "ingest", source="photos", labels="none", val_fraction=0.0, test_fraction=0.0)
    bounds = {"min_accepted_fraction": 0.0, "min_decodable_fraction": 0.0, "max_duplicate_fraction": 1.0}
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I", "F")
    params = change(params, "validate", **bounds, modes=modes, min_side=1)
    for stage in (ingest, validate, shard):
        stage.run(params)

    rows = files.QUARANTINE.read_text().splitlines()[1:]
    quarantined = dict(line.split(",", 1) if line[0] != '"' else line[1:].split('",', 1) for line in rows)
    accepted = {row["path"]: row["sha256"][:24] for row in manifest.read(files.ACCEPTED).to_pylist()}
    left_out = {*made} - {*quarantined} - {*accepted}
    assert left_out == {name for name in made if name.startswith(("bin noise", "bin text", "bin zeros"))}  # no images
    assert all(quarantined.values())
    assert not {name for name in quarantined if made[name].upright is not None}
    assert len(accepted) > 450

    samples = {sample.key: sample for sample in webdataset.read(webdataset.tars("pretrain"))}
    assert {*samples} == {*accepted.values()}
    decoded = dali_decode_all([samples[key].data for key in accepted.values()])
    for (name, key), pixels in zip(accepted.items(), decoded, strict=True):
        np.testing.assert_array_equal(pixels, images.decode(made[name].data), err_msg=name)
        assert pixels.shape[:2] == (samples[key].height, samples[key].width), name
        if made[name].upright is not None:
            np.testing.assert_array_equal(pixels, made[name].upright, err_msg=name)
    assert "files are packed as PNG, because DALI" in capsys.readouterr().out


def test_max_side_shrinks_upright_and_antialiased(tmp_path, sample):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    data = encode(noise, "JPEG", quality=95, exif=exif)
    (tmp_path / "x").write_bytes(data)
    _, packed, extension, _, height, width = sample(source(data), tmp_path, 100)
    shrunk = images.decode(packed)
    assert extension == "jpg"
    assert (height, width) == dali_decode(packed).shape[:2] == (100, 75)
    assert shrunk.shape == (100, 75, 3)
    oracle = Image.fromarray(images.decode(data)).resize((75, 100), Image.Resampling.LANCZOS)
    difference = np.abs(shrunk.astype(int) - np.asarray(oracle))
    assert difference.mean() < 4  # JPEG changes noise that much
    assert difference.max() < 30


def test_max_side_leaves_smaller_images_alone(tmp_path, sample):
    data = encode(picture(width=60, height=100), "JPEG")
    (tmp_path / "x").write_bytes(data)
    packed = sample(source(data), tmp_path, 100)
    assert packed.data == data
    assert (packed.height, packed.width) == (100, 60)


@pytest.mark.parametrize("max_side", [None, 10])
def test_sides_of_every_kind_of_image_are_those_it_decodes_to(nasty, smoke, change, monkeypatch, max_side):
    folder, refused = nasty
    monkeypatch.chdir(folder.parent)
    params = change(change(smoke, "ingest", source=str(folder), labels="none"), "shard", max_side=max_side)
    ingest.run(params)
    rows = [row for row in manifest.read().to_pylist() if refused[row["path"]] is None]
    manifest.write(pa.Table.from_pylist(rows, manifest.SCHEMA), files.ACCEPTED)
    shard.run(params)
    samples = [
        sample for split in manifest.SPLITS if split != "train" for sample in webdataset.read(webdataset.tars(split))
    ]
    assert len(samples) == len(rows) > 10
    for sample in samples:
        assert (sample.height, sample.width) == upright(sample.data) == dali_decode(sample.data).shape[:2]
    turned = {row["sha256"][:24] for row in rows if row["orientation"] == 6}
    assert {(s.height, s.width) for s in samples if s.key in turned} == {(10, 8) if max_side else (24, 20)}


def test_a_lost_image_stops_the_stage_and_changes_nothing(data, smoke):
    data(ROWS)
    files.write_json(files.SHARDS / webdataset.CLASSES_FILE, ["old"])
    (files.RAW / "u/3.jpg").unlink()
    with pytest.raises(
        UserError, match=r"u/3\.jpg cannot be read \(No such file or directory\); run `barlow ingest` again"
    ):
        shard.run(smoke)
    assert [path.name for path in files.SHARDS.parent.iterdir() if "shards" in path.name] == ["shards"]
    assert webdataset.classes() == ["old"]


def test_a_changed_image_is_named(tmp_path, sample):
    (tmp_path / "x").write_bytes(b"other")
    with pytest.raises(UserError, match=r"/x has changed since ingest; run `barlow ingest` again"):
        sample(source(encode(picture(), "PNG")), tmp_path, None)


def test_nothing_to_pretrain_on(data, smoke):
    with pytest.raises(UserError, match=r"data/accepted.parquet is missing; run `barlow validate`"):
        shard.run(smoke)
    data([("a.jpg", "test", "a")])
    with pytest.raises(UserError, match=r"no image of the splits pretrain and train.*ingest.source='synthetic'"):
        shard.run(smoke)
