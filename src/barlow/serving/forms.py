"""The images of a request body: files of a multipart form, or base64 in JSON.

Starlette's form parser is slower (benchmarks/RESULTS.md) and accepts a form that is cut short.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import unquote_to_bytes

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from barlow.serving.limits import RequestError

FIELD = "files"  # of the form
KEY = "images"  # of the JSON
PARTS = 1000  # most parts of a form, images or not: each part takes time


def images(content_type: str, body: bytes, most: int) -> tuple[list[str], list[bytes]]:
    """Return the names that the client gave and the contents of the files: at least one, at most `most`.

    Raises:
        RequestError: the content type is another one (415), the body does not follow it (400), or it has more images
            or parts than allowed (413).
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        boundary = options.get(b"boundary")
        if not boundary:
            raise RequestError(
                400, "form", "the content type names no boundary; let the client library write that header"
            )
        named = _from_form(body, boundary, most)
    elif kind == b"application/json":
        named = _from_json(body, most)
    else:
        raise RequestError(
            415, "content", f"content type {content_type[:50]!r}; send multipart/form-data or application/json"
        )
    if not named:
        raise RequestError(
            400, "form", f"there is no image; name the form's fields `{FIELD}`, or the JSON's key `{KEY}`"
        )
    return [name for name, _ in named], [image for _, image in named]


def _from_form(body: bytes, boundary: bytes, most: int) -> list[tuple[str, bytes]]:
    """Return (name, content) of each part called FIELD that has a file name; skip the other parts."""
    named: list[tuple[str, bytes]] = []
    headers: dict[bytes, bytes] = {}  # of the current part
    content: list[bytes] = []  # of the current part
    key, value = bytearray(), bytearray()  # of the current header
    parts, complete = 0, False

    def end_header() -> None:
        headers[bytes(key).lower()] = bytes(value)
        key.clear()
        value.clear()

    def end_part() -> None:
        nonlocal parts
        parts += 1
        disposition = headers.get(b"content-disposition", b"")
        options = parse_options_header(disposition)[1]
        if options.get(b"name") == FIELD.encode() and b"filename" in disposition.lower():
            named.append((_file_name(disposition, options) or f"{FIELD}[{len(named)}]", b"".join(content)))
        headers.clear()
        content.clear()
        if len(named) > most:
            raise RequestError(413, "images", f"more than the {most} images allowed in a request")
        if parts > PARTS:
            raise RequestError(413, "images", f"more than {PARTS} parts in the form")

    def end() -> None:
        nonlocal complete
        complete = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_header_field": lambda chunk, start, stop: key.extend(chunk[start:stop]),
                "on_header_value": lambda chunk, start, stop: value.extend(chunk[start:stop]),
                "on_header_end": end_header,
                "on_part_data": lambda chunk, start, stop: content.append(chunk[start:stop]),
                "on_part_end": end_part,
                "on_end": end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise RequestError(400, "form", f"the multipart form is broken: {error}") from None
    if not complete:
        raise RequestError(
            400, "form", "the multipart form is cut short, or the boundary in its content type is another"
        )
    return named


def _file_name(disposition: bytes, options: Mapping[bytes, bytes]) -> str:
    """Return a part's file name, by preference the extended one (RFC 5987: filename*=utf-8''caf%C3%A9.png)."""
    if match := re.search(rb"filename\*=([\w-]+)'[\w-]*'([^;\s]*)", disposition, re.IGNORECASE):
        with suppress(LookupError):  # a character set that Python does not know
            return unquote_to_bytes(match[2]).decode(match[1].decode(), errors="backslashreplace")
    return options.get(b"filename", b"").decode(errors="backslashreplace")


def _from_json(body: bytes, most: int) -> list[tuple[str, bytes]]:
    """Return (name, content) of each image; a name is its place in the list."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, "form", f"the body is no JSON: {error}") from None
    texts = document.get(KEY) if isinstance(document, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(400, "form", f'the body must be {{"{KEY}": [base64, ...]}}')
    if len(texts) > most:
        raise RequestError(413, "images", f"{len(texts)} images; at most {most} are allowed in a request")
    try:
        return [(f"{KEY}[{i}]", base64.b64decode(text, validate=True)) for i, text in enumerate(texts)]
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, "form", f"an image is no base64: {error}") from None
