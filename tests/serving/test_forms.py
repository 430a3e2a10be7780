import base64
import json
import random
from email import policy
from email.encoders import encode_noop
from email.mime.application import MIMEApplication
from email.mime.multipart import MIMEMultipart

import httpx
import pytest

from barlow.serving import forms
from barlow.serving.limits import RequestError

PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
BINARY = bytes(range(256)) * 3 + b"\r\n--b\r\n\r\n--b--\r\n\r" + bytes(1000)  # with the start of a boundary, and more


def form(*parts, end=b"--b--\r\n"):
    """Return what forms.images makes of a form of raw parts."""
    return forms.images("multipart/form-data; boundary=b", b"".join(parts) + end, 64)


def by_httpx(files, **fields):
    """Write a form with a public client."""
    request = httpx.Request("POST", "http://test", files=[("files", file) for file in files], data=fields)
    return request.headers["content-type"], request.read()


def by_email(files):
    """Write a form with Python's email package, which keeps no CR and no LF as it is."""
    message = MIMEMultipart("form-data")
    for name, content in files:
        part = MIMEApplication(content.decode("ascii", "surrogateescape"), _encoder=encode_noop)
        part.add_header("Content-Disposition", "form-data", name="files", filename=name)
        message.attach(part)
    head, _, body = message.as_bytes(policy=policy.HTTP).partition(b"\r\n\r\n")
    (content_type,) = [line for line in head.replace(b"\r\n ", b" ").split(b"\r\n") if b"multipart" in line]
    return content_type.partition(b": ")[2].decode(), body


@pytest.mark.parametrize("seed", range(5))
def test_forms_of_httpx_are_read(seed):
    draw = random.Random(seed)
    names = ["a.jpg", "写真 ünïcödé.png", "../../etc/passwd", "/etc/passwd", "a;b=c.png", "%2e%2e", "twice", "twice"]
    files = [(name, draw.randbytes(draw.choice([0, 1, 10, 100_000])) + BINARY) for name in names]
    names, contents = forms.images(*by_httpx(files, comment="no image"), 64)
    assert [*zip(names, contents, strict=True)] == files


@pytest.mark.parametrize("seed", range(5))
def test_forms_of_the_email_package_are_read(seed):
    draw = random.Random(seed)
    kept = bytes(set(range(256)) - set(b"\r\n"))
    files = [(f"{i} of three.png", bytes(draw.choices(kept, k=1000))) for i in range(3)]
    names, contents = forms.images(*by_email(files), 64)
    assert [*zip(names, contents, strict=True)] == files


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (rb'filename="a\"b.png"', 'a"b.png'),
        (b"filename=plain.png", "plain.png"),
        ('filename="é.png"'.encode(), "é.png"),
        (b'filename="\xff.png"', r"\xff.png"),  # no UTF-8: readable all the same
        (b'filename=""', "files[0]"),
        (b'filename="nul\x00.png"', "nul\0.png"),
    ],
)
def test_names_are_kept_as_given(written, name):
    part = b'--b\r\ncontent-DISPOSITION: form-data; name="files"; ' + written + b"\r\n\r\ncontent\r\n"
    assert form(part) == ([name], [b"content"])


def test_other_parts_are_passed_over():
    other = b'--b\r\nContent-Disposition: form-data; name="other"; filename="a"\r\n\r\nx\r\n'
    text = b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n'
    naked = b"--b\r\n\r\nx\r\n"
    assert form(other, text, naked, PART, b"x\r\n", text) == (["a"], [b"x"])
    with pytest.raises(RequestError, match="there is no image; name the form's fields `files`") as refused:
        form(other, text, naked)
    assert refused.value.status == 400


def test_a_form_inside_a_form_is_only_content():
    inner = b'--c\r\nContent-Disposition: form-data; name="files"; filename="inner"\r\n\r\nx\r\n--c--'
    assert form(PART, inner, b"\r\n") == (["a"], [inner])


def test_a_form_that_is_cut_anywhere_is_refused():
    body = PART + b"12345\r\n" + PART + b"67890\r\n--b--"
    for length in range(len(body)):
        with pytest.raises(RequestError) as refused:
            forms.images("multipart/form-data; boundary=b", body[:length], 64)
        assert refused.value.status == 400


@pytest.mark.parametrize(
    ("content_type", "body", "status", "message"),
    [
        ("", b"", 415, "content type ''; send multipart/form-data or application/json"),
        ("image/png", b"x", 415, "content type 'image/png'"),
        ("multipart/mixed; boundary=b", PART, 415, "content type 'multipart/mixed; boundary=b'"),
        ("multipart/form-data", PART, 400, "names no boundary"),
        ("multipart/form-data; boundary=", PART, 400, "names no boundary"),
        ("multipart/form-data; boundary=" + "b" * 300, PART, 400, "form is broken: Boundary length 300"),
        ("multipart/form-data; boundary=c", PART, 400, "form is broken"),
        ("multipart/form-data; boundary=b", b"", 400, "cut short, or the boundary in its content type is another"),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 400, "form is broken|no image"),
        ("multipart/form-data; boundary=b", b"--b\r\nno header\r\n\r\nx\r\n--b--", 400, "form is broken"),
        ("multipart/form-data; boundary=b", b"--b\r\na: " + b"x" * 10_000, 400, "form is broken"),
        ("application/json", b"", 400, "the body is no JSON: "),
        ("application/json", b"[" * 100_000, 400, "the body is no JSON: "),
        ("application/json", b'{"images": ["AAAA"', 400, "no JSON: .* line 1"),
        ("application/json", b"[]", 400, 'must be {"images": '),
        ("application/json", b"{}", 400, 'must be {"images": '),
        ("application/json", b'{"images": "AAAA"}', 400, 'must be {"images": '),
        ("application/json", b'{"images": [1]}', 400, 'must be {"images": '),
        ("application/json", b'{"images": []}', 400, "there is no image; .* the JSON's key `images`"),
        ("application/json", b'{"images": ["AAA"]}', 400, "an image is no base64: "),
        ("application/json", b'{"images": ["AAA-"]}', 400, "an image is no base64: "),
        ("application/json", b'{"images": ["AA\\nAA"]}', 400, "an image is no base64: "),
        ("application/json", '{"images": ["é"]}'.encode(), 400, "an image is no base64: "),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_malformed_bodies_say_what_is_wrong(content_type, body, status, message):
    with pytest.raises(RequestError, match=message) as refused:
        forms.images(content_type, body, 64)
    assert refused.value.status == status


def test_images_in_json_are_base64():
    contents = [b"", b"x", BINARY]
    body = json.dumps({"images": [base64.b64encode(content).decode() for content in contents], "other": 1}).encode()
    names = ["images[0]", "images[1]", "images[2]"]
    assert forms.images("application/json; charset=utf-8", body, 3) == (names, contents)


def test_more_images_than_allowed_are_refused_before_they_are_decoded():
    with pytest.raises(RequestError, match="3 images; at most 2 are allowed in a request") as refused:
        forms.images("application/json", b'{"images": ["", "", "no base64"]}', 2)
    assert refused.value.status == 413
    with pytest.raises(RequestError, match="more than the 2 images allowed in a request") as refused:
        forms.images("multipart/form-data; boundary=b", (PART + b"\r\n") * 4, 2)
    assert refused.value.status == 413


def test_a_form_of_very_many_parts_is_refused_at_once():
    fields = b"--b\r\n\r\n\r\n" * forms.PARTS
    assert form(fields[:-9], PART, b"\r\n") == (["a"], [b""])
    with pytest.raises(RequestError, match="more than 1000 parts in the form") as refused:
        form(fields, PART, b"\r\n")
    assert refused.value.status == 413


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b"filename*=utf-8''caf%C3%A9.png", "café.png"),
        (b"filename=\"cafe.png\"; filename*=UTF-8'en'caf%C3%A9.png", "café.png"),
        (b"filename*=iso-8859-1''caf%E9.png", "café.png"),
        (b"filename*=nonsense''a.png", "files[0]"),
        (b"filename*0=a.png", "files[0]"),
        (b"FileName*=utf-8''a.png", "a.png"),
    ],
)
def test_extended_file_names_are_read(disposition, name):
    """RFC 5987, as requests and curl write a name that is not ASCII; a name in no known form still is an image."""
    part = b'--b\r\nContent-Disposition: form-data; name="files"; ' + disposition + b"\r\n\r\nabc\r\n"
    assert form(part) == ([name], [b"abc"])
