"""The images of a request: files in a multipart form, or base64 in JSON."""

from __future__ import annotations

import base64
import binascii

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from barlow.serving.limits import RequestError

FIELD = "files"  # of the form
KEY = "images"  # of the JSON
PARTS = 1000  # of a form, with those that are no images: each takes its time


def images(content_type: str, body: bytes, most: int) -> tuple[list[str], list[bytes]]:
    """Return names, as the client gave them, and contents of at least one file and at most `most`.

    Raises:
        RequestError: the content type is another one (415), the body does not follow it (400), or there are more (413).
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        boundary = options.get(b"boundary")
        if not boundary:
            raise RequestError(
                400, "form", "the content type names no boundary; let the client library write that header"
            )
        found = _from_form(body, boundary, most)
    elif kind == b"application/json":
        found = _from_json(body, most)
    else:
        raise RequestError(
            415, "content", f"content type {content_type[:50]!r}; send multipart/form-data or application/json"
        )
    if not found:
        raise RequestError(
            400, "form", f"there is no image; name the form's fields `{FIELD}`, or the JSON's key `{KEY}`"
        )
    return [name for name, _ in found], [image for _, image in found]


def _from_form(body: bytes, boundary: bytes, most: int) -> list[tuple[str, bytes]]:
    """Read the parts called FIELD that have a file name; others are passed over."""
    found: list[tuple[str, bytes]] = []
    headers: dict[bytes, bytes] = {}
    name, value, data, parts = bytearray(), bytearray(), list[bytes](), 0

    def end_header() -> None:
        headers[bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def end_part() -> None:
        nonlocal parts
        parts += 1
        options = parse_options_header(headers.get(b"content-disposition"))[1]
        if options.get(b"name") == FIELD.encode() and b"filename" in options:
            file = options[b"filename"].decode(errors="backslashreplace")
            found.append((file or f"{FIELD}[{len(found)}]", b"".join(data)))
        headers.clear()
        data.clear()
        if len(found) > most:
            raise RequestError(413, "images", f"more than the {most} images allowed in a request")
        if parts > PARTS:
            raise RequestError(413, "images", f"more than {PARTS} parts in the form")

    ended = False

    def end() -> None:
        nonlocal ended
        ended = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_header_field": lambda chunk, start, stop: name.extend(chunk[start:stop]),
                "on_header_value": lambda chunk, start, stop: value.extend(chunk[start:stop]),
                "on_header_end": end_header,
                "on_part_data": lambda chunk, start, stop: data.append(chunk[start:stop]),
                "on_part_end": end_part,
                "on_end": end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise RequestError(400, "form", f"the multipart form is broken: {error}") from None
    if not ended:
        raise RequestError(
            400, "form", "the multipart form is cut short, or the boundary in its content type is another"
        )
    return found


def _from_json(body: bytes, most: int) -> list[tuple[str, bytes]]:
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
