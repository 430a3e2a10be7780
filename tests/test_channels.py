"""Images of 1, 5 and 7 channels, with 16 bits, through the whole pipeline."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file
from tiffs import tiff

from barlow import embed, evaluate, export, extract, finetune, index, ingest, pretrain, report, shard, validate
from barlow.core import bands, files, webdataset
from barlow.core.bands import PixelFormat
from barlow.core.errors import UserError
from barlow.encoder.encoder import Encoder
from barlow.training import dry_run, model, views

pytestmark = pytest.mark.usefixtures("one_thread")
SPLITS = ("train", "val", "test")
CASES = {  # by channels: the files, model.arch, and how many values views.mean and views.std have
    1: ("png", "resnet10", 1),
    5: ("tif", "resnet10", 5),
    7: ("tif", "timm:test_convnext", 1),
}


def picture(channels, i):
    """Return uint16 (24 + i % 3, 28, channels): stripes of one of two directions, each channel of its own period."""
    rng = np.random.default_rng([channels, i])
    y, x = np.mgrid[: 24 + i % 3, :28]
    waves = [np.sin((x if i % 2 else y) / (1.5 + c) + rng.uniform(0, 6)) for c in range(channels)]
    return (32768 + 20000 * np.stack(waves, axis=2) + rng.normal(0, 500, (*x.shape, channels))).astype(np.uint16)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels.shape[2] == 1:
        Image.fromarray(pixels[:, :, 0]).save(path)
    else:
        path.write_bytes(tiff(pixels, deflate=True, differences=True))


@pytest.fixture(scope="module", params=CASES)
def project(request, smoke, tmp_path_factory):
    """A folder in which the stages have run on images of that many channels, and its params."""
    channels = request.param
    folder = tmp_path_factory.mktemp("channels")
    extension, arch, values = CASES[channels]
    for split, count in {"train": 24, "val": 8, "test": 16}.items():
        for i in range(count):
            path = folder / "photos" / split / ["rows", "columns"][i % 2] / f"{i}.{extension}"
            save(path, picture(channels, i + 100 * SPLITS.index(split)))

    def change(section, **values):
        return dataclasses.replace(getattr(smoke, section), **values)

    p = dataclasses.replace(
        smoke,
        ingest=change("ingest", source=str(folder / "photos")),
        model=change("model", channels=channels, bits=16, arch=arch, stem="imagenet", projector=(16, 16)),
        views=change(
            "views", size=32, mean=(0.5,) * values, std=(0.25,) * values, saturation=0.0, hue=0.0, grayscale=0.0
        ),
        pretrain=change("pretrain", epochs=2, warmup_epochs=1, batch_size=8, knn_epochs=1),
        evaluate=change("evaluate", labels_per_class=(2,), label_shares=(0.5,), draws=1, knn_k=3, probe_l2=(0.1,)),
        export=change("export", parity_images=3, calibration_images=4, max_accuracy_loss=100.0),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if channels == 5:  # starts from a network of RGB
            start = model.BarlowTwins(dataclasses.replace(p.model, channels=3), 32)
            save_file(start.state_dict(), "start.safetensors")
            p = dataclasses.replace(p, model=dataclasses.replace(p.model, weights="start.safetensors"))
        for stage in (ingest, validate, shard, pretrain, extract, evaluate, export):
            stage.run(p)
        yield folder, p


@pytest.mark.parametrize("project", [5], indirect=True)
def test_given_weights_of_other_channels_leave_out_the_first_layer(project):
    _, p = project
    (lines,) = [row for row in dry_run.describe(p).splitlines() if row.startswith("weights")]
    assert "left out: conv1.weight (shape 64x3x7x7 in the file, 64x5x7x7 here)" in lines
    assert "the projector too" in lines
    assert lines.endswith("; the file's first layer takes model.channels: 3, not 5")
    assert "start" in files.read_json(files.EVALUATION)["encoders"]


def test_shards_hold_the_pixels(project):
    _, p = project
    form = PixelFormat(p.model.channels, 16)
    for sample in webdataset.read(webdataset.tars("test")):
        path = Path(p.ingest.source) / webdataset.sources()[sample.key]
        assert sample.extension == "npy"
        pixels = bands.unpack(sample.data)
        i = int(path.stem)
        assert (pixels == picture(form.channels, i + 100 * SPLITS.index("test"))).all()
        assert (pixels == bands.decode(path.read_bytes(), form)).all()


def viewed(tmp_path, pixels, settings):
    """Return one view of an image in a shard: (height, width, channels)."""
    tar, (height, width, channels) = tmp_path / "val-000000.tar", pixels.shape
    webdataset.write(tar, [webdataset.Sample("0" * 24, bands.pack(pixels), "npy", -1, height, width)])
    (view, _) = next(views.single_views(webdataset.Samples([tar]), np.array([0]), settings, 1, 1, seed=0))
    assert view.shape == (1, channels, settings.size, settings.size)
    return view[0].numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("form", [(1, 8), (1, 16), (3, 16), (5, 8), (16, 16)])
def test_views_without_distortions_are_the_pixels(form, plain, tmp_path):
    form = PixelFormat(*form)
    (pixels,) = bands.noise(1, 28, form)
    view = viewed(tmp_path, pixels, plain(size=28, mean=(0.25,), std=(2.0,)))
    assert np.abs(view - (pixels / form.white - 0.25) / 2).max() < 1e-6


@pytest.mark.parametrize("form", [(1, 8), (1, 16), (3, 16), (5, 8), (16, 16)])
def test_distortions_are_on_the_scale_of_the_bits(form, plain, tmp_path):
    form = PixelFormat(*form)
    (pixels,) = bands.noise(1, 28, form)
    still = {"size": 28, "mean": (0.0,), "std": (1.0,)}
    scale = pixels / form.white
    solarized = viewed(tmp_path, pixels, plain(solarize=(0.0, 1.0), **still))
    assert np.abs(solarized - np.minimum(scale, 1 - scale)).max() < 1e-6
    flipped = viewed(tmp_path, pixels, plain(flip=1.0, **still))
    assert np.abs(flipped - scale[:, ::-1]).max() < 1e-6
    blurred = viewed(tmp_path, pixels, plain(blur=(1.0, 1.0), blur_sigma=(3.0, 3.0), **still))
    assert np.abs(blurred.mean((0, 1)) - scale.mean((0, 1))).max() < 0.06
    assert blurred.std() < scale.std() / 3
    jittered = viewed(tmp_path, pixels, plain(jitter=1.0, brightness=0.5, contrast=0.5, **still))
    inside = (jittered > 0.01) & (jittered < 0.99)
    fitted = np.polyfit(scale[inside], jittered[inside], 1)  # brightness and contrast are one linear map
    assert np.abs(np.polyval(fitted, scale[inside]) - jittered[inside]).max() < 0.01
    assert abs(fitted[0] - 1) > 0.01


def test_three_channels_of_16_bits_lose_their_colour(plain, tmp_path):
    (pixels,) = bands.noise(1, 28, PixelFormat(3, 16))
    grey = viewed(tmp_path, pixels, plain(size=28, mean=(0.0,), std=(1.0,), grayscale=1.0))
    wanted = pixels / 65535 @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert np.abs(grey - wanted[:, :, None]).max() < 0.01


def test_the_encoder_keeps_16_bits(project, tmp_path):
    _, p = project
    encoder, channels = Encoder(), p.model.channels
    assert encoder.form == (channels, 16)
    assert (encoder.metadata["channels"], encoder.metadata["bits"]) == (str(channels), "16")
    a = picture(channels, 0) // 257 * 257
    b = a + np.uint16(100) * (np.arange(28) % 2)[None, :, None].astype(np.uint16)  # the same in 8 bits
    assert (a // 257 == b // 257).all()
    paths = [tmp_path / f"{name}.{CASES[channels][0]}" for name in "ab"]
    save(paths[0], a)
    save(paths[1], b)
    arrays, files_ = encoder.embed([a, b]), encoder.embed(paths)
    assert (arrays == files_).all()
    assert np.abs(arrays[0] - arrays[1]).max() > 1e-5
    wanted = model.load_encoder()[0](torch.from_numpy(np.stack([a, b]))).numpy()
    assert np.allclose(arrays, wanted, atol=1e-4)


def test_other_arrays_are_refused(project):
    encoder = Encoder()
    channels = encoder.form.channels
    wanted = rf"an image must be a uint16 array \(height, width, {channels}\).*; got "
    for array in (np.zeros((20, 20, channels), np.uint8), np.zeros((20, 20, channels + 1), np.uint16)):
        with pytest.raises(ValueError, match=wanted):
            encoder.embed([array])


def test_the_rest_takes_such_images(project):
    folder, p = project
    finetune.run(dataclasses.replace(p, finetune=dataclasses.replace(p.finetune, draws=0)))
    files.write_json(files.CLAIMS, {"claims": []})
    report.run(p)
    index.run()
    index.run([folder / "photos/test"], out="other")
    embed.run([folder / "photos/test"], out=folder / "vectors.parquet")
    assert parquet.read_table(folder / "vectors.parquet").num_rows == 16
    assert json.loads(files.EXPORTING.read_text())["parity"]["cosine_min"] > 0.9999
    assert f"dims: [ -1, -1, {p.model.channels} ]" in Path("models/triton/encoder/config.pbtxt").read_text()
    assert "TYPE_UINT16" in Path("models/triton/encoder/config.pbtxt").read_text()


def test_no_image_has_so_many_channels(tmp_path, smoke, change, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        path = tmp_path / f"photos/{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((20, 20), 50).convert("RGB").save(path)
    p = change(change(smoke, "ingest", source=str(tmp_path / "photos")), "model", channels=4)
    with pytest.raises(UserError, match=r"0.jpg has 3 channels where model.channels=4 .*set model.channels"):
        ingest.run(p)
