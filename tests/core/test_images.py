import io
import struct
import typing
import warnings
import zlib
from pathlib import Path

import hostile
import numpy as np
import pytest
import yaml
from PIL import EpsImagePlugin, Image

from barlow.core import images
from barlow.settings import params

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey3(values):
    return np.stack([values] * 3, axis=2)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_rgb(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = images.decode(encode(Image.fromarray(RGB), kind, **options))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, RGB)


def test_jpeg_is_close():
    smooth = np.tile(np.arange(0, 240, 5, dtype=np.uint8)[:, None, None], (1, 48, 3))
    decoded = images.decode(encode(Image.fromarray(smooth), "JPEG", quality=95)).astype(int)
    assert np.abs(decoded - smooth).max() <= 4


def test_grey_and_its_alpha():
    np.testing.assert_array_equal(images.decode(encode(Image.fromarray(GREY))), grey3(GREY))
    alpha = Image.fromarray(np.dstack([GREY, 255 - GREY]), "LA")
    np.testing.assert_array_equal(images.decode(encode(alpha)), grey3(GREY))


def test_one_bit():
    bits = GREY > 127
    np.testing.assert_array_equal(images.decode(encode(Image.fromarray(bits))), grey3(255 * bits.astype(np.uint8)))


def test_alpha_is_dropped_not_blended():
    rgba = np.dstack([RGB, RNG.integers(0, 256, RGB.shape[:2], dtype=np.uint8)])
    np.testing.assert_array_equal(images.decode(encode(Image.fromarray(rgba))), RGB)


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palette(transparency):
    palette = np.array([[10, 20, 30], [200, 100, 0], [7, 7, 7]], np.uint8)
    indices = RNG.integers(0, 3, (5, 7), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(images.decode(encode(image, **options)), palette[indices])


def test_cmyk():
    ink = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    light = 1 - ink.astype(float) / 255
    wanted = 255 * light[:, :, :3] * light[:, :, 3:]
    decoded = images.decode(encode(Image.fromarray(ink, "CMYK"), "TIFF"))
    assert np.abs(decoded - wanted).max() <= 1.5


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_to_8(kind):
    wide = np.array([[0, 128, 129, 257], [32896, 65535, 65407, 1000]], np.uint16)
    decoded = images.decode(encode(Image.fromarray(wide), kind))
    np.testing.assert_array_equal(decoded, grey3(np.array([[0, 0, 1, 1], [128, 255, 255, 4]], np.uint8)))


BIG_ENDIAN = (
    b"MM\0*" + struct.pack(">IH", 8, 9)
    + b"".join(
        struct.pack(">HHII", tag, 4, 1, value)
        for tag, value in [
            (256, 4), (257, 2), (258, 16), (259, 1), (262, 1), (273, 8 + 2 + 12 * 9 + 4), (277, 1), (278, 2), (279, 16)
        ]
    )
    + bytes(4)
)  # fmt: skip


def test_16_bits_of_either_byte_order_are_scaled_alike():
    wide = np.array([[0, 128, 129, 257], [32896, 65535, 65407, 1000]], np.uint16)
    data = BIG_ENDIAN + wide.astype(">u2").tobytes()
    assert Image.open(io.BytesIO(data)).mode == "I;16B"
    np.testing.assert_array_equal(images.decode(data), grey3(np.array([[0, 0, 1, 1], [128, 255, 255, 4]], np.uint8)))


def test_a_dark_image_of_16_bits_stays_dark():
    data = encode(Image.fromarray(np.full((2, 2), 200, np.uint16)), "TIFF")
    np.testing.assert_array_equal(images.decode(data), np.ones((2, 2, 3), np.uint8))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([0, 0.1], np.float32), [0, 26]),
        (np.array([0, 1.5, 254.6], np.float32), [0, 2, 255]),
        (np.array([0, 257, 65535], np.float32), [0, 1, 255]),
        (np.array([0, 1, 255], np.int32), [0, 1, 255]),
        (np.array([0, 300, 65535], np.int32), [0, 1, 255]),
    ],
)
def test_32_bits_are_scaled_by_their_range(values, wanted):
    decoded = images.decode(encode(Image.fromarray(values[None]), "TIFF"))
    assert decoded[0].tolist() == [[value] * 3 for value in wanted]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([0, 70_000.5], np.float32), "float values from 0 to 70000.5: save the image with 8 or 16 bits"),
        (np.array([-0.5, 1], np.float32), "float values from -0.5 to 1: save"),
        (np.array([0, np.nan], np.float32), "float values from nan to nan: save"),
        (np.array([0, np.inf], np.float32), "float values from 0 to inf: save"),
        (np.array([-1, 5], np.int32), "32-bit values from -1 to 5: save the image with 8 or 16 bits"),
        (np.array([0, 65_536], np.int32), "32-bit values from 0 to 65536: save"),
    ],
)
def test_32_bits_of_no_known_range_are_refused_with_the_reason(values, reason):
    with pytest.raises(ValueError, match=reason):
        images.decode(encode(Image.fromarray(values[None]), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0junk, and more junk", b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01"])
def test_a_broken_exif_block_refuses_no_picture(kind, exif):
    plain = Image.fromarray(RGB)
    image = images.open_image(encode(plain, kind, exif=exif))
    assert images.orientation(image) == 1
    np.testing.assert_array_equal(images.to_rgb(image), images.decode(encode(plain, kind)))


def test_a_digest_tells_pixels_and_shapes_apart():
    assert images.digest(RGB) == images.digest(np.asfortranarray(RGB))
    others = [RGB[::-1], RGB.reshape(7, 5, 3), RGB ^ (np.arange(105).reshape(5, 7, 3) == 50)]
    assert len({images.digest(pixels) for pixels in (RGB, *others)}) == 4


def test_exif_orientation():
    for orientation, turn in hostile.TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        decoded = images.decode(encode(Image.fromarray(RGB), exif=exif))
        np.testing.assert_array_equal(decoded, turn(RGB), err_msg=str(orientation))


def test_exif_orientation_of_16_bits():
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    decoded = images.decode(encode(Image.fromarray(wide), exif=exif))
    np.testing.assert_array_equal(decoded[:, :, 0], [[3, 0], [4, 1], [5, 2]])


def test_first_frame_of_a_gif():
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 255)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    decoded = images.decode(data, formats=images.INGESTED)
    np.testing.assert_array_equal(decoded, np.zeros((4, 4, 3), np.uint8))


JPEG = encode(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"no image, but text of some length", "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (encode(Image.fromarray(RGB))[:40], "[a-z]"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "[a-z]"),
    ],
    ids=["empty", "text", "half a JPEG", "start of a PNG", "PNG of zeros"],
)
def test_broken_files_have_a_reason_of_one_line(data, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        images.decode(data)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)  # no address of memory: the manifest is reproducible


def png_header(width, height):
    """A PNG that ends after its header, so decoding fails as truncated."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_pixels_are_limited_by_the_header():
    with pytest.raises(images.TooManyPixelsError, match="20000 x 20000 pixels, more than the 1000 allowed"):
        images.decode(png_header(20_000, 20_000), max_pixels=1000)
    np.testing.assert_array_equal(images.decode(encode(Image.fromarray(RGB)), max_pixels=35), RGB)
    with pytest.raises(images.TooManyPixelsError):
        images.decode(encode(Image.fromarray(RGB)), max_pixels=34)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def iptc(content):
    """An IPTC file whose header says 10 x 10 pixels in JPEG; no reader checks `content` against the header."""
    fields = [(3, 60, b"\1\0"), (3, 20, b"\0\x0a"), (3, 30, b"\0\x0a"), (3, 120, b"\0\5"), (8, 10, content)]
    return b"".join(struct.pack(">BBBH", 0x1C, record, tag, len(data)) + data for record, tag, data in fields)


@pytest.mark.parametrize("data", [EPS, iptc(EPS)], ids=["EPS", "EPS in IPTC"])
def test_a_program_is_not_run(monkeypatch, data):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(EpsImagePlugin.subprocess, "check_call", lambda *args, **kwargs: started.append(args))
    with pytest.raises(images.UnknownFormatError):
        images.decode(data)
    assert not started


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
@pytest.mark.parametrize("kind", ["ICO", "ICNS", "IPTC"])
def test_a_large_image_in_a_small_container_is_not_decoded(kind):
    png = encode(Image.fromarray(np.zeros((200, 200), bool)))
    chunk = b"ic11" + struct.pack(">I", len(png) + 8) + png
    data = {
        "ICO": struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 1, len(png), 22) + png,
        "ICNS": b"icns" + struct.pack(">I", len(chunk) + 8) + chunk,
        "IPTC": iptc(png),
    }[kind]
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == kind
    with pytest.raises(images.UnknownFormatError, match=f"format {kind}|not an image in a known format"):
        images.decode(data, max_pixels=2000)


def every_other_format():
    """A small picture in each format that Pillow writes and we refuse, and the first bytes of formats it only reads."""
    Image.init()
    contents = {
        "FITS": b"SIMPLE  =                    T".ljust(2880),
        "QOI": b"qoif" + struct.pack(">IIBB", 9, 9, 3, 0),
    }
    contents["XPM"] = b'/* XPM */ static char * a[] = {\n"9 9 1 1",\n"a c #000000",\n'
    for kind in sorted(set(Image.SAVE) - {*images.INGESTED, "PDF"}):
        for mode in ("RGB", "P", "1", "F"):
            try:
                contents[kind] = encode(Image.new(mode, (16, 16)), kind)
                break
            except (OSError, ValueError, KeyError, DeprecationWarning):
                continue
    return contents


@pytest.mark.parametrize("formats", [images.FORMATS, images.INGESTED])
def test_no_other_format_is_opened(monkeypatch, formats):
    """Not even the header is read: reading that of BLP, JPEG 2000 or FITS took too much time and memory."""
    data = every_other_format()
    assert {"BLP", "DDS", "ICNS", "ICO", "JPEG2000", "PCX", "PPM", "TGA"} <= set(data)

    def opened(*_):
        raise AssertionError("its plugin was asked to open the file")

    for kind, (_, accept) in Image.OPEN.items():
        if kind not in formats and kind != "JPEG":
            monkeypatch.setitem(Image.OPEN, kind, (opened, accept))
    for kind, content in data.items():
        with pytest.raises(
            images.UnknownFormatError, match=r"format \w+; decoded are BMP, JPEG|not an image"
        ) as caught:
            images.decode(content, formats=formats)
        assert kind not in {"BLP", "JPEG2000", "DDS", "QOI", "FITS"} or f"format {kind};" in str(caught.value)


def test_what_ingest_accepts_by_default_is_what_is_decoded():
    accepted = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())["validate"]["formats"]
    assert set(accepted) == set(images.FORMATS)
    assert set(typing.get_args(typing.get_args(typing.get_type_hints(params.Validate)["formats"])[0])) == set(
        images.INGESTED
    )


def test_broken_is_told_from_unknown():
    for data in (b"", b"text", b"%PDF-1.7\n", bytes(1000)):
        with pytest.raises(images.UnknownFormatError):
            images.decode(data)
    for data in (JPEG[: len(JPEG) // 2], png_header(20, 20)):
        with pytest.raises(ValueError, match=r"truncated|broken") as caught:
            images.decode(data)
        assert caught.type is ValueError


def test_without_a_limit_pillows_own_does_not_apply(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    np.testing.assert_array_equal(images.decode(encode(Image.fromarray(RGB))), RGB)


def test_other_warnings_stay_on():
    images.decode(JPEG)
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", UserWarning, stacklevel=1)


def test_encoding_is_undone_by_pillow():
    png = Image.open(io.BytesIO(images.encode(Image.fromarray(RGB), "PNG")))
    assert png.format == "PNG"
    np.testing.assert_array_equal(np.asarray(png), RGB)
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    small, large = (len(images.encode(noise, "JPEG", quality=quality)) for quality in (20, 95))
    assert small < large


@pytest.mark.parametrize(("size", "wanted"), [((300, 60), (50, 10)), ((60, 300), (10, 50)), ((50, 20), (50, 20))])
def test_a_thumbnail_is_a_jpeg_that_is_never_enlarged(size, wanted):
    width, height = size
    pixels = np.broadcast_to(np.array([200, 90, 10], np.uint8), (height, width, 3))
    thumbnail = Image.open(io.BytesIO(images.jpeg(pixels, 50)))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", wanted)
    assert np.abs(np.asarray(thumbnail).astype(int) - [200, 90, 10]).max() <= 2
