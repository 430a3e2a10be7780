"""Image files that decoders read differently, made from a seed: each kind is a broken, odd or rare file of some format.

`make(seed)` yields a few hundred of them. A `File` knows its upright pixels where the file leaves no doubt about them.
"""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ORIENTATION = 0x0112
SIZES = [(25, 18), (1, 9), (64, 48)]  # width, height
TURNS = {  # EXIF 2.3, 4.6.4: the stored pixels, upright
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


class File(NamedTuple):
    kind: str
    name: str
    data: bytes
    upright: np.ndarray | None  # uint8 (height, width, 3); None: whatever Pillow says, or refused


def encode(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decode(data):
    """Pillow's pixels, as stored."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def short(n, order="<"):
    return struct.pack(f"{order}H", n)


def ifd(*entries, order="<"):
    """A TIFF header with one directory of (tag, type, count, value)."""
    body, extra, at = short(len(entries), order), b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        place = value.ljust(4, b"\0")
        if len(value) > 4:
            place, extra = struct.pack(f"{order}I", at + len(extra)), extra + value
        body += struct.pack(f"{order}HHI", tag, kind, count) + place
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8) + body + bytes(4) + extra


def turned(n, order="<"):
    """An EXIF block that says only the orientation."""
    return ifd((ORIENTATION, 3, 1, short(n, order)), order=order)


# --- JPEG


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def app1(*blocks):
    return b"".join(segment(0xE1, b"Exif\0\0" + block) for block in blocks)


def lossless_jpeg(pixels):
    """An RGB file of process 14 (SOF3), predictor 1, where each of the 17 Huffman codes has five bits."""
    height, width, _ = pixels.shape
    bits = []
    for y in range(height):
        for x in range(width):
            for c in range(3):
                before = pixels[y, x - 1, c] if x else pixels[y - 1, 0, c] if y else 128
                difference = int(pixels[y, x, c]) - int(before)
                size = abs(difference).bit_length()
                bits.append(f"{size:05b}")
                if size:
                    bits.append(f"{difference if difference > 0 else difference + 2**size - 1:0{size}b}")
    stream = "".join(bits)
    stream += "1" * (-len(stream) % 8)
    entropy = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\0")
    parts = [b"\xff\xd8", segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")]  # transform 0: RGB
    parts.append(segment(0xC3, struct.pack(">BHHB", 8, height, width, 3) + b"".join(bytes([i, 17, 0]) for i in b"RGB")))
    parts.append(segment(0xC4, b"\0" + bytes([0, 0, 0, 0, 17, *[0] * 11]) + bytes(range(17))))
    parts.append(segment(0xDA, b"\3" + b"".join(bytes([i, 0]) for i in b"RGB") + b"\1\0\0"))
    return b"".join(parts) + entropy + b"\xff\xd9"


def jpegs(image, rng):
    plain = encode(image, "JPEG", quality=90)
    pixels, tables = decode(plain), plain.index(b"\xff\xdb")

    def insert(content):
        return plain[:2] + content + plain[2:]

    yield "junk between segments", plain[:tables] + b"hello" + plain[tables:], pixels
    yield "ff00 between segments", plain[:tables] + b"\xff\x00" + plain[tables:], pixels
    yield "fill bytes", plain[:tables] + b"\xff" * 5 + plain[tables:], pixels
    yield "no EOI", plain[:-2], None
    yield "half an EOI", plain[:-1], None
    yield "zeros for EOI", plain[:-2] + bytes(200), None
    yield "trailing garbage", plain + rng.bytes(50), pixels
    yield "APP14 in two sizes", plain[:tables] + segment(0xEE, b"Adobe\0d\0\0\0\0\1") + plain[tables:], None
    yield "APP14 of 11 bytes", plain[:tables] + b"\xff\xee\0\x0dAdobe\0d\0\0\0\0\1" + plain[tables:], None
    yield "APP14 that says RGB", insert(segment(0xEE, b"Adobe\0d\0\0\0\0\0")), None
    yield "APP14 of an unknown transform", insert(segment(0xEE, b"Adobe\0d\0\0\0\0\7")), None
    restarts = encode(image, "JPEG", quality=90, restart_marker_blocks=1)
    yield "restart markers", restarts, decode(restarts)
    for n in range(2):
        marker = restarts.find(bytes([0xFF, 0xD0 + n]))
        if marker > 0:
            yield f"restart marker {n} missing", restarts[:marker] + restarts[marker + 2 :], None
            yield f"restart marker {n} wrong", restarts[: marker + 1] + b"\xd5" + restarts[marker + 2 :], None
    yield "half", plain[: len(plain) // 2], None
    yield "cut by 10", plain[:-10], None
    for name, options in {
        "progressive": {"progressive": True},
        "progressive 4:4:4": {"progressive": True, "subsampling": 0},
        "4:4:4": {"subsampling": 0},
        "4:2:2": {"subsampling": 1},
        "4:1:1": {"subsampling": "4:1:1"},
        "quality 1": {"quality": 1},
        "comment": {"comment": b"\xff\xd8 hello"},
    }.items():
        data = encode(image, "JPEG", **{"quality": 90} | options)
        yield name, data, decode(data)
    for mode in ("L", "CMYK"):
        data = encode(image.convert(mode), "JPEG", quality=90)
        yield mode, data, None
        if mode == "CMYK":
            yield "YCCK", data.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2"), None
            yield "CMYK without APP14", data[:2] + data[2 + 2 + 14 :], None
    yield "lossless process", lossless_jpeg(np.asarray(image)), np.asarray(image)
    for n in TURNS:
        yield f"EXIF {n}", insert(app1(turned(n))), TURNS[n](pixels)
        yield f"EXIF {n} big-endian", insert(app1(turned(n, ">"))), TURNS[n](pixels)
    yield "EXIF 0", insert(app1(turned(0))), pixels
    yield "EXIF 9", insert(app1(turned(9))), pixels
    yield "EXIF twice, 6 then 1", insert(app1(turned(6), turned(1))), None
    yield "EXIF twice, 1 then 6", insert(app1(turned(1), turned(6))), None
    yield "EXIF twice, none then 6", insert(app1(ifd((0x10F, 2, 2, b"A\0")), turned(6))), None
    yield "Exif-0-0 twice", insert(app1(b"Exif\0\0" + turned(6))), None
    two = ifd((0x11A, 3, 2, short(72) * 2), (ORIENTATION, 3, 1, short(6)))
    yield "another tag with two values", insert(app1(two)), TURNS[6](pixels)
    yield "orientation with two values", insert(app1(ifd((ORIENTATION, 3, 2, short(6) * 2)))), None
    yield "orientation as BYTE", insert(app1(ifd((ORIENTATION, 1, 1, b"\6")))), None
    yield "orientation as RATIONAL", insert(app1(ifd((ORIENTATION, 5, 1, struct.pack("<II", 6, 1))))), pixels
    yield "EXIF of junk", insert(app1(rng.bytes(40))), pixels
    yield "EXIF cut short", insert(app1(turned(6)[:12])), None
    yield "XMP 6", insert(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 6)), None
    yield "MPO", encode(image, "MPO", save_all=True, append_images=[image.transpose(3)]), None


# --- PNG

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, depth, colour, rows, interlaced=0, before=b"", after=b""):
    """A file of rows of bytes, without filters; colour: 0 grey, 2 RGB, 3 palette, 4 grey + alpha, 6 RGB + alpha."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return SIGNATURE + chunk(b"IHDR", header) + before + chunk(b"IDAT", data) + after + chunk(b"IEND", b"")


def pngs(image, rng):
    pixels = np.asarray(image)
    plain, (width, height) = encode(image, "PNG"), image.size
    rows = [row.tobytes() for row in pixels]

    def rgb(before=b"", after=b""):
        return png(width, height, 8, 2, rows, before=before, after=after)

    idat = plain.index(b"IDAT")
    damaged = bytearray(rgb())
    damaged[-13] ^= 255  # of the CRC of IDAT
    wide = rng.integers(0, 65536, (height, width, 4)).astype(">u2")
    yield "no IEND", plain[:-12], None
    yield "cut by 4", plain[:-4], None
    yield "cut by 1", plain[:-1], None
    yield "trailing garbage", plain + rng.bytes(50), pixels
    yield "wrong CRC of IDAT", bytes(damaged), None
    yield "wrong CRC of a text", rgb(chunk(b"tEXt", b"Comment\0hello")[:-1] + b"!"), None
    yield "rows missing", png(width, height, 8, 2, rows[: -(height // 3) or None]), None
    yield "rows too many", png(width, height, 8, 2, rows + rows[:3]), None
    yield "Adler cut", SIGNATURE + plain[8 : idat - 4] + chunk(b"IDAT", zlib.compress(bytes(99))[:-4]), None
    yield "unknown critical chunk", rgb(chunk(b"ABCD", b"xyz")), None
    yield "unknown chunk", rgb(chunk(b"abCd", b"xyz")), pixels
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    pieces = b"".join(chunk(b"IDAT", content[i : i + 7]) for i in range(0, len(content), 7))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    yield "IDAT in pieces", SIGNATURE + header + pieces + chunk(b"IEND", b""), pixels
    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = [pixels[y::dy, x::dx] for x, y, dx, dy in adam7]
    yield "interlaced", png(width, height, 8, 2, [r.tobytes() for p in passes if p.size for r in p], 1), pixels
    yield "16-bit RGB", png(width, height, 16, 2, [row[:, :3].tobytes() for row in wide]), None
    yield "16-bit RGB + alpha", png(width, height, 16, 6, [row.tobytes() for row in wide]), None
    grey = np.repeat((wide[:, :, :1] / 257).round().astype(np.uint8), 3, axis=2)
    yield "16-bit grey", png(width, height, 16, 0, [row[:, 0].tobytes() for row in wide]), grey
    yield "16-bit grey, dark", png(width, height, 16, 0, [(row[:, 0] // 512).tobytes() for row in wide]), None
    yield "16-bit grey + alpha", png(width, height, 16, 4, [row[:, :2].tobytes() for row in wide]), None
    palette = rng.integers(0, 256, (16, 3), dtype=np.uint8)
    for depth in (1, 2, 4):
        indices = rng.integers(0, 2**depth, (height, width), dtype=np.uint8)
        lines = []
        for row in indices:
            line = "".join(f"{i:0{depth}b}" for i in row)
            line += "0" * (-len(line) % 8)
            lines.append(int(line, 2).to_bytes(len(line) // 8, "big"))
        table = chunk(b"PLTE", palette[: 2**depth].tobytes())
        yield f"{depth}-bit palette", png(width, height, depth, 3, lines, before=table), palette[indices]
        clear = chunk(b"tRNS", bytes([0, 128]))
        yield f"{depth}-bit palette, tRNS", png(width, height, depth, 3, lines, before=table + clear), palette[indices]
        shades = np.repeat((indices * (255 // (2**depth - 1)))[:, :, None], 3, axis=2)
        yield f"{depth}-bit grey", png(width, height, depth, 0, lines), shades
    yield "palette too short", png(width, height, 4, 3, lines, before=chunk(b"PLTE", palette[:5].tobytes())), None
    yield "tRNS of RGB", rgb(chunk(b"tRNS", struct.pack(">HHH", *map(int, pixels[0, 0])))), pixels
    yield (
        "tRNS of grey",
        png(width, height, 8, 0, [r[:, 0].tobytes() for r in pixels], before=chunk(b"tRNS", b"\0\7")),
        None,
    )
    yield "gAMA", rgb(chunk(b"gAMA", struct.pack(">I", 100_000))), pixels
    yield "sRGB", rgb(chunk(b"sRGB", b"\0")), pixels
    yield "cICP", rgb(chunk(b"cICP", b"\x09\x10\0\1")), pixels
    yield "broken ICC profile", rgb(chunk(b"iCCP", b"x\0\0junk")), None
    for mode in ("L", "LA", "RGBA", "P", "1"):
        yield mode, encode(image.convert(mode), "PNG"), np.asarray(image.convert(mode).convert("RGB"))
    frames = [image.transpose(3), image]
    yield "APNG", encode(image, "PNG", save_all=True, append_images=frames, duration=100), None
    hidden = encode(image, "PNG", save_all=True, append_images=frames, default_image=True, duration=100)
    yield "APNG with a default image", hidden, pixels
    for n in TURNS:
        yield f"EXIF {n}", rgb(chunk(b"eXIf", turned(n))), TURNS[n](pixels)
    yield "EXIF after the pixels", rgb(after=chunk(b"eXIf", turned(6))), None
    yield "EXIF twice", rgb(chunk(b"eXIf", turned(1)) + chunk(b"eXIf", turned(6))), None
    yield "Exif-0-0 before it", rgb(chunk(b"eXIf", b"Exif\0\0" + turned(6))), None
    yield "EXIF of junk", rgb(chunk(b"eXIf", rng.bytes(40))), pixels
    yield "EXIF empty", rgb(chunk(b"eXIf", b"")), pixels
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", (XMP % 6).decode())
    yield "XMP 6", encode(image, "PNG", pnginfo=text), None


# --- WebP, TIFF and the others


def webp(image, exif=None, flags=8, **options):
    """A file with an EXIF chunk just as it is given; Pillow's `save` would mend it."""
    data = encode(image, "WEBP", **options)
    if exif is None:
        return data
    width, height = (struct.pack("<I", side - 1)[:3] for side in image.size)
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + width + height + data[12:]
    body += b"EXIF" + struct.pack("<I", len(exif)) + exif + bytes(len(exif) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webps(image, rng):
    clear = image.copy()
    clear.putalpha(image.convert("L").transpose(0))
    for name, options in {"lossy": {"quality": 80}, "lossless": {"lossless": True, "exact": True}}.items():
        pixels = decode(webp(image, **options))
        yield name, webp(image, **options), pixels
        yield f"{name}, alpha", webp(clear, **options), None
        yield f"{name}, trailing garbage", webp(image, **options) + rng.bytes(20), None
        yield f"{name}, cut", webp(image, **options)[:-9], None
        for n in TURNS:
            yield f"{name}, EXIF {n}", webp(image, turned(n), **options), TURNS[n](pixels)
        for n in (3, 6):
            yield f"{name}, Exif-0-0, {n}", webp(image, b"Exif\0\0" + turned(n), **options), TURNS[n](pixels)
        yield f"{name}, EXIF of junk", webp(image, rng.bytes(40), **options), pixels
        yield f"{name}, EXIF that the header denies", webp(image, turned(6), 0, **options), None
        yield f"{name}, XMP 6", webp(image, xmp=XMP % 6, **options), None
        yield f"{name}, animated", webp(image, save_all=True, append_images=[image.transpose(3)], **options), None
        for width in (1, 2, 3):
            for height in (1, 2, 3):
                tiny = image.resize((width, height))
                yield f"{name}, {width} x {height}", webp(tiny, **options), decode(webp(tiny, **options))


def tiff16(values, order):
    """A file of mode I;16 (order <) or I;16B (order >); Pillow writes the first only."""
    height, width = values.shape
    entries = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, 8 + 2 + 12 * 9 + 4), (277, 1)]
    entries += [(278, height), (279, 2 * width * height)]
    places = [(tag, 4, 1, struct.pack(f"{order}I", value)) for tag, value in entries]
    return ifd(*places, order=order) + values.astype(f"{order}u2").tobytes()


def tiffs(image, rng):
    pixels, grey = np.asarray(image), np.asarray(image.convert("L"))
    shades = np.repeat(grey[:, :, None], 3, axis=2)
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK"):
        yield (
            mode,
            encode(image.convert(mode), "TIFF"),
            None if mode == "CMYK" else decode(encode(image.convert(mode), "PNG")),
        )
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        data = encode(image, "TIFF", compression=compression)
        yield compression, data, None if compression == "jpeg" else pixels
    for n in TURNS:
        yield f"orientation {n}", encode(image, "TIFF", tiffinfo={ORIENTATION: n}), TURNS[n](pixels)
    for name, order in {"I;16": "<", "I;16B": ">"}.items():
        yield name, tiff16(257 * grey.astype(int), order), shades
        yield f"{name}, dark", tiff16(grey, order), np.repeat((grey / 257).round().astype(np.uint8)[:, :, None], 3, 2)
    spread = grey.astype(np.float32).copy()
    spread[0, 0], spread[-1, -1] = 0, 255
    whole = np.repeat(spread.astype(np.uint8)[:, :, None], 3, axis=2)
    for name, values, truth in [
        ("F, 0 to 1", spread / 255, whole),
        ("F, 0 to 255", spread, whole),
        ("F, 0 to 65535", spread * 257, whole),
        ("F, beyond", spread * 1000, None),
        ("F, negative", spread - 100, None),
        ("F, NaN", np.where(spread > 100, np.nan, spread), None),
        ("F, infinity", np.where(spread > 100, np.inf, spread), None),
        ("I, 0 to 255", spread.astype(np.int32), whole),
        ("I, 0 to 65535", (spread * 257).astype(np.int32), whole),
        ("I, beyond", spread.astype(np.int32) * 1000, None),
        ("I, negative", spread.astype(np.int32) - 100, None),
    ]:
        yield name, encode(Image.fromarray(values.astype(np.float32) if name[0] == "F" else values), "TIFF"), truth
    yield "many pages", encode(image, "TIFF", save_all=True, append_images=[image.transpose(3)]), pixels
    yield "cut", encode(image, "TIFF")[:-30], None


def others(image, rng):
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield f"BMP {mode}", encode(image.convert(mode), "BMP"), None
    yield "BMP, cut", encode(image, "BMP")[:-20], None
    yield "GIF", encode(image, "GIF"), None
    yield "text", b"I am a text. " + rng.bytes(5).hex().encode(), None
    yield "zeros", bytes(int(rng.integers(50, 5000))), None
    yield "noise", rng.bytes(500), None


def make(seed=0):
    """Yield every kind in every size of SIZES, with other pixels each."""
    for i, (width, height) in enumerate(SIZES):
        for family, extension in ((jpegs, "jpg"), (pngs, "png"), (webps, "webp"), (tiffs, "tif"), (others, "bin")):
            rng = np.random.default_rng([seed, i, len(family.__name__)])
            low = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            image = Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)
            for kind, data, upright in family(image, rng):
                name = f"{extension} {kind}"
                yield File(name, f"{name} {width}x{height}.{extension}".replace(":", "-"), data, upright)
