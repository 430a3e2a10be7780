"""Thousands of bad requests to one running service: each is answered, and none changes the service.

`HOSTILE=kind:seed pytest tests/serving/test_hostile.py -k requests` sends one of them and prints the answer.
"""

import base64
import io
import json
import os
import random
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from services import png, start

SECONDS = 5  # until each answer
ROUND = 50  # requests between two checks that all is well
IMAGES = "/v1/embed", "/v1/classify", "/v1/search"
INFER = "/v2/models/encoder/infer"
ROUTES = (
    *("/", "/metrics", "/docs", "/openapi.json", "/v1/model", "/v1/index/map", "/v1/index/samples", "/v2"),
    *("/v1/index/samples/0", "/v1/index/thumbnails/0", "/v2/health/live", "/v2/health/ready", "/v2/models/encoder"),
    *("/v2/models/encoder/ready", "/v2/models/encoder/versions/encoder.onnx/ready", *IMAGES, INFER),
)
JSON = "application/json"
FORM = "multipart/form-data; boundary=b"


class Case(NamedTuple):
    """The bytes that a client sends; one that lies about their number ends with `half_close`, and may get no answer."""

    raw: bytes
    half_close: bool = False


def request(method, path, body=b"", content_type=None, headers=(), length=None):
    head = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close", *headers]
    if content_type:
        head.append(f"Content-Type: {content_type}")
    if body or length is not None or method in ("POST", "PUT", "PATCH"):
        head.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(head).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


def form(*contents, name=b'"x.png"', end=b"--b--\r\n"):
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename=' + name + b"\r\n\r\n"
    return b"".join(head + content + b"\r\n" for content in contents) + end


def image(draw, content):
    """Send a file, as a form or in JSON, to one of the paths for images."""
    if draw.random() < 0.3:
        return Case(request("POST", draw.choice(IMAGES), json_images(content), JSON))
    return Case(request("POST", draw.choice(IMAGES), form(content), FORM))


def json_images(*contents):
    return json.dumps({"images": [base64.b64encode(content).decode() for content in contents]}).encode()


def picture(draw, kind, mode="RGB", **options):
    width, height = draw.randint(1, 90), draw.randint(1, 90)
    pixels = Image.frombytes("RGB", (width, height), draw.randbytes(3 * width * height))
    buffer = io.BytesIO()
    pixels.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def damaged(draw):
    """A file of a real format, cut, with bits turned over, or with a part gone, doubled or overwritten."""
    exif = Image.Exif()
    exif[0x0112] = draw.randint(0, 9)
    whole = picture(
        draw,
        *draw.choice(
            [
                *[("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA")],
                *[("WEBP", "RGB"), ("WEBP", "RGBA"), ("TIFF", "RGB"), ("TIFF", "L"), ("GIF", "P"), ("BMP", "RGB")],
            ]
        ),
        exif=exif,
    )
    content, where = bytearray(whole), draw.randrange(len(whole))
    how = draw.randrange(6)
    if how == 0:
        del content[where:]
    elif how == 1:  # in the headers, where sizes and offsets are
        for _ in range(draw.randint(1, 6)):
            content[draw.randrange(min(len(content), 200))] ^= 1 << draw.randrange(8)
    elif how == 2:
        for _ in range(draw.randint(1, 40)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == 3:
        del content[where : where + draw.randint(1, 100)]
    elif how == 4:
        content[where:where] = draw.randbytes(draw.randint(1, 100))
    else:
        content[where : where + 8] = draw.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7])
    return image(draw, bytes(content))


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width, height, pixels, *chunks, depth=8, colour=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff_of(width, height, strip, compression):
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, compression), (262, 3, 1), (273, 4, 8 + 98 + 18)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, len(strip))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return (b"II*\0\x08\0\0\0" + directory).ljust(8 + 98 + 18, b"\0") + strip


ZEROS = zlib.compress(bytes(30_000_000), 9)
FRAMES = io.BytesIO()
_frames = [Image.new("P", (60, 60), i % 7) for i in range(1000)]
_frames[0].save(FRAMES, "GIF", save_all=True, append_images=_frames[1:], optimize=False)


def bomb(draw):
    """A short file that says it is large, or is."""
    side = draw.choice([5_001, 20_000, 50_000, 2**31 - 1])
    bombs = [
        png_of(side, side, ZEROS),
        png_of(5_000, 5_000, ZEROS, depth=1, colour=0),
        png_of(10, 10, ZEROS),
        png_of(1_000, 1_000, ZEROS),  # as large as is allowed
        png_of(10, 10, zlib.compress(bytes(310)), chunk(b"iCCP", b"x\0\0" + ZEROS)),
        png_of(10, 10, zlib.compress(bytes(310)), chunk(b"zTXt", b"x\0\0" + ZEROS)),
        png_of(10, 10, zlib.compress(bytes(310)), *[chunk(b"iTXt", b"x\0\1\0\0\0" + ZEROS)] * 20),
        tiff_of(side, side, ZEROS, 8),
        tiff_of(10, 10, ZEROS, 8),
        tiff_of(2_000, 2_000, ZEROS[:1000], 8),
        FRAMES.getvalue(),
        b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\3\1\x11\0\2\x11\1\3\x11\1\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0?\0",
        b"BM" + struct.pack("<IHHIIiiHHIIIIII", 54, 0, 0, 54, 40, side % 2**31, -side, 1, 24, 0, 0, 0, 0, 0, 0),
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\2\2L\1\0;",
        b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f" + bytes(8),
        b"P6 %d %d 255\n" % (side, side),
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, side % 2**31, side % 2**31, 8, 3) + bytes(12),
    ]
    return image(draw, draw.choice(bombs))


MAGICS = [
    *(b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF\xff\xff\0\0WEBPVP8 "),
    *(b"\0\0\1\0", b"\0\0\2\0", b"icns", b"8BPS", b"DDS \x7c\0\0\0", b"P1 ", b"P4 99999 99999 ", b"P6\n1 1\n255\n"),
    *(b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.7", b"SIMPLE  =                    T", b"\xffO\xffQ\0\x2f", b"qoif"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\1\xda\0\1", b"Y\xa6j\x95", b"BLP2", b"\x0a\5\1\x08", b"#define a_width 9\n"),
    *(
        b"/* XPM */",
        b"\xd7\xcd\xc6\x9a",
        b"\0\0\0\x1cftypavif",
        b"\x1c\2\0\0\2",
        b"FTEX",
        b"<svg",
        b"PK\3\4",
        b"\x1f\x8b",
    ),
]


def nonsense(draw):
    """The beginning of some format, and then nothing or anything."""
    rest = draw.choice([b"", b"\xff" * 64, bytes(64), draw.randbytes(draw.randint(1, 3000))])
    return image(draw, draw.choice(MAGICS) + rest)


def empty(draw):
    contents = draw.choice([[b""], [], [b""] * 64, [b""] * 65, [b"", picture(draw, "PNG"), b""]])
    body, kind = draw.choice([(form(*contents), FORM), (json_images(*contents), JSON), (b"", FORM), (b"", JSON)])
    return Case(request("POST", draw.choice(IMAGES), body, kind))


def v1_document(draw):
    return {"images": [base64.b64encode(picture(draw, "PNG")).decode() for _ in range(draw.randint(1, 3))]}


def v2_document(draw):
    shape = [draw.randint(1, 3), draw.randint(1, 5), draw.randint(1, 5), 3]
    data = np.frombuffer(draw.randbytes(int(np.prod(shape))), np.uint8).reshape(shape)
    given = {"name": "images", "datatype": "UINT8", "shape": shape, "data": data.tolist(), "parameters": {}}
    outputs = [{"name": name, "parameters": {"binary_data": draw.random() < 0.5}} for name in ("embedding", "logits")]
    return {"id": "7", "inputs": [given], "outputs": outputs, "parameters": {"binary_data_output": False}}


def places(value, collected):
    """Append every (container, key) of a document to a list and return it."""
    for key in [*value] if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        collected.append((value, key))
        places(value[key], collected)
    return collected


def nested(depth, inside=0):
    for _ in range(depth):
        inside = [inside]
    return inside


def mutated(draw, document):
    """Change what a document says, or its bytes."""
    for _ in range(draw.randint(1, 3)):
        container, key = draw.choice(places(document, []) or [({"a": 1}, "a")])
        how = draw.randrange(5)
        if how == 0:
            del container[key]
        elif how == 1:
            container[key] = {"a": container[key]} if draw.random() < 0.5 else [container[key]]
        elif how == 2 and isinstance(container, dict):
            container[draw.choice(["", "name", "data", "\0", "é", "A" * 999, "parameters"])] = container[key]
        elif how == 3 and isinstance(container, list):
            container += container * draw.choice([1, 30])
        else:
            container[key] = draw.choice(
                [
                    *(None, True, False, -1, 0, 1, 256, 3.0, 0.5, 1e308, -0.0, 2**31, 2**53 + 1, 2**63, 2**64, 10**400),
                    *(float("nan"), float("inf"), "", "\0", "images", "UINT8", "FP32", "x" * 5000, "\ud800", "🙂"),
                    *([], {}, [[]], [{}], {"": None}, nested(30), nested(900), [None] * 50, ["a", "b" * 9999]),
                    *([1, 1, 1, 3], [64, 5000, 5000, 3], [-1, -1, -1, 3], {"binary_data_size": 3}, "AAAA"),
                ]
            )
    body = bytearray(json.dumps(document).encode())
    if draw.random() < 0.25:
        where = draw.randrange(len(body) + 1)
        body[where : where + draw.randint(0, 3)] = draw.choice([b"", b"\xff", b"[", b"}", b'"', b"\\u", b"9" * 400])
    return bytes(body)


def v1_json(draw):
    return Case(request("POST", draw.choice(IMAGES), mutated(draw, v1_document(draw)), JSON))


def v2_json(draw):
    return Case(request("POST", INFER, mutated(draw, v2_document(draw)), JSON))


ODD = [
    *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"images":' + b"[" * 100_000),
    *(
        b"",
        b"null",
        b"true",
        b"0",
        b'""',
        b"[]",
        b"{}",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"-",
        b"9" * 100_000,
    ),
    *(b"\xef\xbb\xbf{}", '{"images": []}'.encode("utf-16"), b'{"images": [NaN]}', b'{"images": ["\\ud800"]}', b"{}{}"),
    *(
        b'{"inputs": [Infinity]}',
        b'{"images": [], "images": 1}',
        b'"' + b"x" * 1_000_000 + b'"',
        b"\0" * 1000,
        b"{'a': 1}",
    ),
    b'{"inputs": [' + b",".join([b"[1]"] * 100_000) + b"]}",
    b'{"inputs": [{"name": %s}]}' % (b"[" * 1000 + b"]" * 1000),  # as deep as is parsed
    b'{"images": [' + b",".join([b'""'] * 100_000) + b"]}",
]


def odd_json(draw):
    return Case(request("POST", draw.choice([*IMAGES, INFER]), draw.choice(ODD), JSON))


def wrong_base64(draw):
    text = base64.b64encode(picture(draw, "PNG")).decode()
    where = draw.randrange(len(text))
    text = draw.choice(
        [
            *(text[:where] + wrong + text[where:] for wrong in ("\n", " ", "-", "_", "=", "é", "\0", "%2B", "====")),
            *(text[:where], "data:image/png;base64," + text, text + "=", "=" + text, "=" * 100, text * 2),
        ]
    )
    return Case(request("POST", draw.choice(IMAGES), json.dumps({"images": [text]}).encode(), JSON))


def tensor_lies(draw):
    """The header says where the JSON ends, and the JSON how much follows: not both are true."""
    shape = [draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 9), 3]
    size = int(np.prod(shape))
    said = draw.choice(
        [size, size, size - 1, size + 1, 0, -size, 2**31, 2**63, 2**70, str(size), None, [size], 1e9, True]
    )
    given = {"name": "images", "datatype": "UINT8", "shape": shape, "parameters": {"binary_data_size": said}}
    head = json.dumps({"inputs": [given]}).encode()
    n = len(head)
    lengths = [n, n, n - 1, n + 1, n // 2, 0, -1, -n, 10**9, 10**30, "9" * 5000, "0" * 5000, "", "x", "0x10", f"+{n}"]
    length = draw.choice([*lengths, f"{n}.0", f"{n}, {n}", "²", "\udcff", n + size])
    tail = draw.randbytes(max(size + draw.choice([0, 0, 0, -1, 1, -size, 1000]), 0))
    headers = [f"Inference-Header-Content-Length: {length}"]
    if draw.random() < 0.1:
        headers *= 2
    return Case(request("POST", INFER, head + tail, "application/octet-stream", headers))


def huge_headers(draw):
    size = draw.choice([1_000, 10_000, 66_000, 200_000, 1_000_000])
    method, path, body, kind = draw.choice([("GET", "/v1/model", b"", None), ("POST", "/v1/embed", form(b"x"), FORM)])
    many = [f"X-{i}: {'x' * 90}" for i in range(size // 100)]
    return Case(
        draw.choice(
            [
                request(method, path, body, kind, [f"X-Big: {'x' * size}"]),
                request(method, path, body, kind, many),
                request(method, path, body, kind, [f"{'X' * size}: 1"]),
                request(method, f"{path}?{'x' * size}", body, kind),
                request(method, f"/{'x' * size}", body, kind),
                request(method, path, body, f"multipart/form-data; boundary={'b' * size}"),
                request(method, path, body, "multipart/form-data" + ";" * size),
                request(method, path, body, kind, [f"Cookie: {'a=b; ' * (size // 5)}"]),
            ]
        )
    )


TRICKS = [
    *("..", "../", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "a%00.png"),
    *(
        "/",
        "//",
        "//etc/passwd",
        ".",
        "%",
        "%zz",
        "%ff",
        "%c0%ae%c0%ae",
        "é",
        "写真",
        "\udcff",
        "%F0%9F%99%82",
        "\\..\\",
    ),
    *(
        "x" * 5000,
        "%41" * 3000,
        "../" * 1000,
        "?top=1&top=x",
        "?%00",
        "#a",
        ";a=b",
        "~root",
        "$HOME",
        "{name}",
        "*",
        "-1",
    ),
    *("0", "99999999999999999999", "1e3", "%20", "?k=%ff", "?top=9999999999", "%0d%0aSet-Cookie:%20a=b", "nan", "𝟙"),
]


def paths(draw):
    route, trick = draw.choice([*ROUTES, "/static-offline-docs/", "/v1/index/", "/v2/models/"]), draw.choice(TRICKS)
    cut = draw.randrange(len(route) + 1)
    path = draw.choice([route + trick, f"{route}/{trick}", route[:cut] + trick + route[cut:], f"/{trick}{route}"])
    body, kind = draw.choice([(b"", None), (form(b"x"), FORM), (b"{}", JSON)])
    method = draw.choice(["GET", "GET", "POST", "DELETE"])
    return Case(request(method, path, body if method == "POST" else b"", kind))


def wrong_methods(draw):
    methods = [
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "PATCH",
        "DELETE",
        "OPTIONS",
        "TRACE",
        "PROPFIND",
        "BREW",
        "get",
        "CONNECT",
    ]
    path = draw.choice([*ROUTES, "/nothing", "*", "http://other/v1/model", "other:443"])
    body = draw.choice([b"", form(picture(draw, "PNG")), b"{}"])
    extra = draw.choice(
        [[], ["Expect: 100-continue"], ["Upgrade: websocket", "Connection: Upgrade"], ["Range: bytes=0-1"]]
    )
    return Case(request(draw.choice(methods), path, body, draw.choice([FORM, JSON, None]), extra))


def broken_form(draw):
    good, part = form(picture(draw, "PNG")), form(b"x", end=b"")
    name = draw.choice(
        [
            b'"a\\"b"',
            b'"a\r\nX: y"',
            b'"a\0b"',
            b'"../../../etc/passwd"',
            b'"%s"' % (b"x" * 5000),
            b"",
            b'"',
            b"a;b",
            b'"\xff"',
        ]
    )
    mutations = bytearray(good)
    for _ in range(draw.randint(1, 5)):
        mutations[draw.randrange(min(len(good), 90))] = draw.choice(b'\r\n-":;= \0\xffbf')
    nested_form = b"--c\r\n\r\n" + part + b"\r\n--c--"
    kinds = [FORM, FORM, "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=c"]
    kinds += [
        'multipart/form-data; boundary="',
        "multipart/form-data; boundary*=utf-8''%F0%9F",
        "multipart/mixed; boundary=b",
    ]
    kinds += [
        "multipart/form-data; boundary=\udcff",
        "multipart/form-data;;;=;boundary=b",
        "multipart/form-data; boundary=b, c",
    ]
    bodies = [
        *(bytes(mutations), bytes(mutations), bytes(mutations), good[: draw.randrange(len(good))], good, good[5:]),
        *(part, b"x\r\n" + good, good + good, b"\r\n" * 1000 + good, b"--b" * 1000, b"--b\r\n" * 3000, b"--b--", b"-"),
        *(form(nested_form), form(b"\r\n--b\r\n\r\n"), form(b"--b--"), form(b"\r\n--b"), form(b"x", name=name)),
        *(b"--b\r\n\r\n\r\n" * 3000 + b"--b--", form(*[b"x"] * 3000), form(*[b""] * 65), good.replace(b"\r\n", b"\n")),
        *(b"--b\r\n" + b"a: b\r\n" * 5000 + b"\r\n" + good, b"--b\r\n: \r\n\r\n--b--", b"--b\r\na\r\n\r\n--b--"),
    ]
    return Case(request("POST", draw.choice(IMAGES), draw.choice(bodies), draw.choice(kinds)))


def wrong_types(draw):
    """Good bodies for other paths, or under the name of another type or coding."""
    kinds = [
        JSON,
        FORM,
        "text/plain",
        "image/png",
        "",
        "a/b;c",
        "application/json; charset=utf-16",
        "\udcff",
        "é",
        "x" * 999,
    ]
    body = draw.choice(
        [json_images(png(1, 2, 3)), form(png(1, 2, 3)), json.dumps(v2_document(draw)).encode(), png(1, 2, 3)]
    )
    coding = draw.choice(
        [[], [], ["Content-Encoding: gzip"], ["Content-Encoding: br"], ["Transfer-Encoding: identity"]]
    )
    return Case(request("POST", draw.choice([*IMAGES, INFER]), body, draw.choice(kinds), coding))


def lying_length(draw):
    body, kind = draw.choice([(form(picture(draw, "PNG")), FORM), (json_images(png(1, 2, 3)), JSON)])
    path, n = draw.choice([*IMAGES, INFER]), len(body)
    chunked = b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" % path.encode()
    chunked += b"Connection: close\r\nContent-Type: %s\r\n\r\n" % kind.encode()
    length = draw.choice([n + 1, n + 100_000, n - 1, 0, 1, -1, 2**31, 2**63, 10**30, "x", "", f"{n}, {n}", "0" * 5000])
    return Case(
        draw.choice(
            [
                request("POST", path, body, kind, length=length),
                request("POST", path, body, kind, length=length),
                request("POST", path, body, kind, [f"Content-Length: {n + 5}"]),
                request("POST", path, body, kind, ["Transfer-Encoding: chunked"]),
                chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (n, body),
                chunked + b"%x\r\n%s\r\n" % (n, body),
                chunked + b"fffffffffffffffff\r\n" + body,
                chunked + b"-1\r\n" + body,
                chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (n - 3, body),
                chunked + b"1\r\nx\r\n" * 3000 + b"0\r\n\r\n",
            ]
        ),
        half_close=True,
    )


def no_http(draw):
    start_of = request("POST", "/v1/embed", form(b"x"), FORM)
    return Case(
        draw.choice(
            [
                *(
                    draw.randbytes(draw.randint(1, 2000)) + b"\r\n\r\n",
                    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(200),
                ),
                *(
                    b"GET / HTTP/9.9\r\n\r\n",
                    b"GET /\r\n\r\n",
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                    b"GET  / HTTP/1.1\r\n\r\n",
                ),
                *(start_of[: draw.randrange(len(start_of))], b"\r\n" * 5000, b"GET / HTTP/1.1\r\nHost\r\n\r\n", b""),
                *(
                    b"GET / HTTP/1.1\r\n a: b\r\n\r\n",
                    b"GET / HTTP/1.1\nHost: x\n\n",
                    b"GET / HTTP/1.1\r\nA\0: b\r\n\r\n",
                ),
                *(
                    b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
                    b"GET /%ff\0 HTTP/1.1\r\n\r\n",
                    start_of * 20,
                    b"GET / HTTP/1.0\r\n\r\n",
                ),
            ]
        ),
        half_close=True,
    )


KINDS = {
    damaged: 1600, bomb: 120, nonsense: 280, empty: 40, v1_json: 300, v2_json: 700, odd_json: 120, wrong_base64: 100,
    tensor_lies: 300, huge_headers: 80, paths: 700, wrong_methods: 240, broken_form: 400, wrong_types: 120,
    lying_length: 120, no_http: 100,
}  # fmt: skip
DOCUMENTED_503 = "images are waiting already", "no answer within", "the time was over before its turn"


class Answer(NamedTuple):
    status: int
    headers: dict
    body: bytes


def exchange(port, case):
    """Send a request's bytes as they are; return the answer, or None where the connection ended without one."""
    with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
        try:
            connection.sendall(case.raw)
            if case.half_close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # answered before all of it was read
        method = case.raw.partition(b" ")[0].decode("latin-1")
        response = HTTPResponse(connection, method=method)
        try:
            response.begin()
            return Answer(response.status, dict(response.getheaders()), response.read())
        except (ConnectionError, HTTPException):
            return None


def complaint(case, answer, seconds):
    """Return what is wrong with an answer, or None."""
    if seconds > SECONDS:
        return f"took {seconds:.1f} s"
    if answer is None:
        return None if case.half_close else "no answer"
    text = answer.body.decode(errors="replace")
    if answer.status >= 500 and not (answer.status == 503 and any(why in text for why in DOCUMENTED_503)):
        return "an error of the server"
    if answer.status >= 400 and not case.raw.startswith(b"HEAD "):
        try:
            document = json.loads(answer.body)
        except ValueError:
            return "the error is no JSON"
        if [*document] != ["error"] or not isinstance(document["error"], str) or not document["error"]:
            return "the error is not as described"
    if "/etc/passwd" not in text and "root:x:" in text:
        return "a file of the machine"
    return None


def tried(port, kind, seed):
    """Return what is wrong with the answer to a case, with all that is needed to run it alone."""
    case = kind(random.Random(f"{kind.__name__}:{seed}"))
    begun = time.monotonic()
    try:
        answer = exchange(port, case)
    except OSError as error:
        return f"HOSTILE={kind.__name__}:{seed}: {error!r} after {time.monotonic() - begun:.1f} s; {case.raw[:300]!r}"
    wrong = complaint(case, answer, time.monotonic() - begun)
    return f"HOSTILE={kind.__name__}:{seed}: {wrong}; {case.raw[:300]!r} -> {answer!r:.500}" if wrong else None


@pytest.fixture
def service(tmp_path, mean_onnx):
    """A service with classes and an index of twelve images; --max-pixels is small, so that memory shows a leak."""
    from barlow import index

    model = mean_onnx(tmp_path / "models/encoder.onnx", ["red", "green", "blue"])
    (tmp_path / "images").mkdir()
    for i in range(12):
        (tmp_path / f"images/{i}.png").write_bytes(png(20 * i, 10, 250 - 20 * i))
    index.run([tmp_path / "images"], model=model, out=tmp_path / "models/index")
    steady = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # or glibc keeps large blocks that are free, as chance will have it
    with start(model, "--max-pixels", "1000000", cwd=tmp_path, env=steady) as service:
        yield service


GOOD = png(10, 20, 30, size=(7, 5))


def well(port):
    """A good image is answered as always."""
    for path, key, wanted in [("/v1/embed", "embedding", [10, 20, 30]), ("/v1/classify", "class", "blue")]:
        answer = exchange(port, Case(request("POST", path, form(GOOD), FORM)))
        assert answer is not None
        assert answer.status == 200
        assert json.loads(answer.body)["results"][0][key] == wanted
    return True


def test_bad_requests_are_answered_and_change_nothing(service):
    if only := os.environ.get("HOSTILE"):
        kind, _, seed = only.partition(":")
        chosen = globals()[kind]
        print(exchange(service.port, chosen(random.Random(f"{kind}:{seed}"))))
        assert tried(service.port, chosen, seed) is None
        return
    cases = [(kind, seed) for kind, count in KINDS.items() for seed in range(count)]
    random.Random(0).shuffle(cases)
    assert len(cases) >= 2000
    process, memory = psutil.Process(service.process.pid), []
    with ThreadPoolExecutor(4) as pool:
        for first in range(0, len(cases), ROUND):
            some = cases[first : first + ROUND]
            wrong = [why for why in pool.map(lambda case: tried(service.port, *case), some) if why]
            assert not wrong, "\n".join(wrong)
            assert well(service.port)
            memory.append(process.memory_info().rss)
    assert service.process.poll() is None
    middle = max(memory[: len(memory) // 2])
    assert max(memory[len(memory) // 2 :]) < 1.1 * middle, [rss >> 20 for rss in memory]
    assert "Traceback" not in service.log


def test_slow_and_vanishing_clients_hold_nobody_up(service):
    whole = request("POST", "/v1/embed", form(GOOD), FORM)
    cuts = [1, 20, len(whole) // 2, len(whole) - 1]
    connections = [socket.create_connection(("127.0.0.1", service.port), SECONDS) for _ in range(60)]
    slow, silent, gone = connections[:20], connections[20:40], connections[40:]
    for i, connection in enumerate(silent + gone):
        connection.sendall(whole[: cuts[i % 4]])
    for connection in gone[:10]:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset
        connection.close()
    for connection in gone[10:]:
        connection.shutdown(socket.SHUT_WR)
    step = len(whole) // 30
    for first in range(0, len(whole), step):
        for connection in slow:
            connection.sendall(whole[first : first + step])
        assert well(service.port)
    for connection in slow:
        response = HTTPResponse(connection)
        response.begin()
        assert json.loads(response.read())["results"][0]["embedding"] == [10, 20, 30]
    for connection in connections:
        connection.close()
    assert well(service.port)
    assert "Traceback" not in service.log


def test_clients_that_do_not_read_their_answers_hold_nobody_up(service):
    large = request("GET", "/openapi.json").replace(b"Connection: close\r\n", b"") * 200
    connections = [socket.create_connection(("127.0.0.1", service.port), SECONDS) for _ in range(20)]
    for connection in connections:
        connection.setblocking(False)
        with suppress(BlockingIOError):
            connection.send(large)
    assert well(service.port)
    for connection in connections:
        connection.close()
    assert well(service.port)


CHECKS = schemathesis.Config.from_dict(
    {
        "checks": {
            # The service may refuse a request that the schema allows: random bytes are seldom an image, and a schema
            # cannot demand that the data have the given shape.
            "positive_data_acceptance": {"enabled": False},
            "negative_data_rejection": {"expected-statuses": [400, 404, 413, 415, 422]},  # 413 is not in the default
        }
    }
)


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_the_interface_is_as_openapi_describes_it(service, mode):
    """No error of the server, documented status codes and content types, answers that conform to their schemas."""
    described = schemathesis.openapi.from_url(f"{service.url}/openapi.json", config=CHECKS)
    operations = [result.ok() for result in described.get_all_operations()]
    assert {operation.path for operation in operations} > {*IMAGES, "/v2/models/{name}/infer", "/v1/model", "/metrics"}
    for operation in operations:
        takes = operation.body or operation.path_parameters or operation.query
        if not takes and mode.is_negative:
            continue  # nothing can be wrong with it

        @settings(
            max_examples=40 if takes else 1,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[*HealthCheck],
        )
        @given(operation.as_strategy(generation_mode=mode))
        def conforms(case):
            case.call_and_validate(timeout=SECONDS)

        conforms()
    assert well(service.port)


def test_good_answers_conform_to_the_description(service):
    """Those to bodies that make sense, which are drawn too seldom."""
    described = schemathesis.openapi.from_url(f"{service.url}/openapi.json", config=CHECKS)
    for path in IMAGES:
        for images in ([GOOD], [GOOD, b"no image"]):
            body = json.loads(json_images(*images))
            answer = described[path]["POST"].Case(body=body, media_type=JSON).call_and_validate(timeout=SECONDS)
            assert answer.status_code == 200
    for path in ("/v2/models/{name}", "/v2/models/{name}/ready"):
        case = described[path]["GET"].Case(path_parameters={"name": "encoder"})
        assert case.call_and_validate(timeout=SECONDS).status_code == 200
    infer = described["/v2/models/{name}/infer"]["POST"]
    for binary in (False, True):
        outputs = [{"name": "logits", "parameters": {"binary_data": binary}}]
        document = v2_document(random.Random(0)) | {"outputs": outputs}
        case = infer.Case(path_parameters={"name": "encoder"}, body=document, media_type=JSON)
        assert case.call_and_validate(timeout=SECONDS).status_code == 200
    for path in ("/v1/index/thumbnails/{number}", "/v1/index/samples/{number}"):
        case = described[path]["GET"].Case(path_parameters={"number": 11})
        assert case.call_and_validate(timeout=SECONDS).status_code == 200
