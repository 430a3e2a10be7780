import asyncio
import base64
import io
import json
import re

import httpx
import numpy as np
import pytest
from PIL import Image
from services import png, start

from barlow.core import webdataset
from barlow.encoder.encoder import Encoder
from barlow.serving.app import app
from barlow.settings.flags import Flags

CLASSES = ["a", "b", "c", "d"]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def encoder(indexed):
    return Encoder(indexed / "models/encoder.onnx")


@pytest.fixture(scope="module")
def client(indexed):
    """A client of a running service with at most 8 images per request and 40,000 pixels per image."""
    flags = "--max-images", "8", "--max-pixels", "40000"
    with (
        start(indexed / "models/encoder.onnx", *flags, cwd=indexed) as service,
        httpx.Client(base_url=service.url, timeout=30, trust_env=False) as client,
    ):
        yield client


def noise(*size, mode="RGB"):
    wide = mode.startswith("I")
    return Image.fromarray(RNG.integers(0, 65536 if wide else 256, size, dtype=np.uint16 if wide else np.uint8))


def file(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation=6):
    """The EXIF block of a camera that was turned, by default on its side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


FILES = {
    "写真 1.png": file(noise(30, 40, 3)),
    "../../etc/passwd": file(noise(64, 48, 3), "JPEG"),
    "turned.jpg": file(noise(20, 50, 3), "JPEG", exif=turned()),
    "palette.png": file(noise(33, 17, 3).convert("P")),
    "alpha.webp": file(noise(24, 24, 3).convert("RGBA"), "WEBP"),
    "deep.tif": file(noise(21, 40, mode="I;16"), "TIFF"),
    "cmyk.jpg": file(noise(28, 28, 3).convert("CMYK"), "JPEG"),
    "gray.bmp": file(noise(9, 200), "BMP"),
}


def form(files):
    return {"files": [("files", (name, content)) for name, content in files.items()]}


def in_json(files):
    return {"json": {"images": [base64.b64encode(content).decode() for content in files.values()]}}


@pytest.fixture(scope="module")
def expected(encoder, tmp_path_factory):
    """Embeddings and logits of FILES, as `Encoder` gives them for files on a disk."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / str(i) for i in range(len(FILES))]
    for path, content in zip(paths, FILES.values(), strict=True):
        path.write_bytes(content)
    return encoder.embed(paths), encoder.classify(paths)


def softmax(logits):
    exponentials = np.exp(logits.astype(float))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("send", [form, in_json])
def test_embeddings_are_those_of_the_encoder(client, expected, send):
    answer = client.post("/v1/embed", **send(FILES))
    assert answer.status_code == 200
    answered = answer.json()
    assert {key: answered[key] for key in ("model", "space", "dim")} == {
        "model": "encoder.onnx",
        "space": "space of edges",
        "dim": 12,
    }
    names = [*FILES] if send is form else [f"images[{i}]" for i in range(len(FILES))]
    assert [result["name"] for result in answered["results"]] == names
    np.testing.assert_allclose(
        [result["embedding"] for result in answered["results"]], expected[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("send", [form, in_json])
def test_one_image_alone_is_answered_the_same(client, expected, send):
    for i, (name, content) in enumerate(FILES.items()):
        (result,) = client.post("/v1/embed", **send({name: content})).json()["results"]
        np.testing.assert_allclose(result["embedding"], expected[0][i], rtol=1e-5, atol=1e-5)


def test_the_orientation_of_the_camera_matters(client):
    """Otherwise the test above would prove nothing about `turned.jpg`."""
    plain = FILES["turned.jpg"].replace(turned().tobytes(), turned(1).tobytes())
    assert plain != FILES["turned.jpg"]
    results = client.post("/v1/embed", **form({"a": FILES["turned.jpg"], "b": plain})).json()["results"]
    assert not np.allclose(results[0]["embedding"], results[1]["embedding"], atol=1e-3)


@pytest.mark.parametrize("top", [1, 2, 4, 1000])
def test_classes_are_the_most_probable_ones(client, expected, top):
    answer = client.post(f"/v1/classify?top={top}", **form(FILES))
    probabilities = softmax(expected[1])
    for result, row in zip(answer.json()["results"], probabilities, strict=True):
        order = np.argsort(-row)[:top]
        best = result["probabilities"]
        assert [entry["class"] for entry in best] == [CLASSES[i] for i in order]
        np.testing.assert_allclose([entry["probability"] for entry in best], row[order], rtol=1e-4)
        assert {"class": result["class"], "probability": result["probability"]} == best[0]


@pytest.mark.parametrize(("path", "most"), [("classify?top", 1000), ("search?k", 100)])
@pytest.mark.parametrize(
    "value", ["0", "-1", "1.5", "x", "", "1001", "9" * 5000, "%C2%B2", "%00"], ids=lambda value: value[:9]
)
def test_a_number_out_of_range_is_refused(client, path, most, value):
    answer = client.post(f"/v1/{path}={value}", **form({"a": FILES["cmyk.jpg"]}))
    assert answer.status_code == 422
    assert f"it must be from 1 to {most}" in answer.json()["error"]


def test_neighbours_are_those_of_an_exact_search(client, indexed, encoder, expected):
    with np.load(indexed / "models/index/space of edges.npz") as arrays:
        vectors, about = arrays["vectors"].astype(float), json.loads(arrays["about"].tobytes())
    assert vectors.shape == (260, 12)
    queries = expected[0].astype(float)
    cosines = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ vectors.T
    results = client.post("/v1/search?k=7", **form(FILES)).json()["results"]
    for result, row in zip(results, cosines, strict=True):
        order = np.argsort(-row)[:7]
        near = result["neighbours"]
        assert [item["id"] for item in near] == order.tolist()
        assert [(item["name"], item["label"]) for item in near] == [
            (about["names"][i], about["labels"][i]) for i in order
        ]
        np.testing.assert_allclose([item["similarity"] for item in near], row[order], atol=1e-5)
        assert len(result["position"]) == 2


def test_an_image_of_the_index_finds_itself(client, small_shards):
    items = [
        sample for split in ("train", "pretrain") for sample in webdataset.read(small_shards.glob(f"{split}-*.tar"))
    ]
    chosen = {items[i].key: items[i].data for i in (0, 59, 60, 259)}
    results = client.post("/v1/search?k=100", **form(chosen)).json()["results"]
    for result, i in zip(results, (0, 59, 60, 259), strict=True):
        first, *others = result["neighbours"]
        assert (first["id"], first["name"]) == (i, result["name"])
        assert first["similarity"] == pytest.approx(1, abs=1e-5)
        assert len({item["id"] for item in others} - {i}) == 99


BAD = {
    "empty": (b"", 415, "not an image in a known format"),
    "text": (b"I am a text.", 415, "not an image in a known format"),
    "cut.png": (FILES["写真 1.png"][:-60], 422, "truncated|broken"),
    "cut.jpg": (FILES["../../etc/passwd"][:-60], 422, "truncated"),
    "large.png": (png(1, 2, 3, size=(201, 200)), 413, "201 x 200 pixels, more than the 40000 allowed"),
    "program.eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        415,
        "format EPS; decoded are BMP, JPEG",
    ),
}


@pytest.mark.parametrize("path", ["embed", "classify", "search"])
@pytest.mark.parametrize("name", BAD)
def test_one_bad_image_fails_only_itself(client, path, name):
    content, status, reason = BAD[name]
    good = {"first": FILES["cmyk.jpg"], "last": FILES["palette.png"]}
    wanted = client.post(f"/v1/{path}", **form(good)).json()["results"]
    answer = client.post(f"/v1/{path}", **form({"first": good["first"], name: content, "last": good["last"]}))
    assert answer.status_code == 200
    first, bad, last = answer.json()["results"]
    assert sorted(bad) == ["error", "name", "status"]
    assert (bad["name"], bad["status"]) == (name, status)
    assert re.search(reason, bad["error"])
    for result, alone in zip((first, last), wanted, strict=True):
        assert result.keys() == alone.keys()
        key = {"embed": "embedding", "classify": "probability", "search": "position"}[path]
        np.testing.assert_allclose(result[key], alone[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [["text", "cut.png"], ["cut.png", "large.png", "text"], ["large.png"]])
def test_if_all_are_bad_the_first_says_why(client, names):
    answer = client.post("/v1/embed", **form({name: BAD[name][0] for name in names}))
    assert answer.status_code == BAD[names[0]][1]
    assert [*answer.json()] == ["error"]
    assert re.match(f"{re.escape(names[0])}: .*({BAD[names[0]][2]})", answer.json()["error"])


def test_names_come_back_as_given_and_open_nothing(client, indexed):
    """Also those that httpx would write in another way: the form is written by hand."""
    named = {"a.png": "a.png", 'quote\\".png': 'quote".png', "": "files[2]", "写真": "写真"}
    named[str(indexed / "models/encoder.onnx")] = str(indexed / "models/encoder.onnx")
    parts = [
        b'--b\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n'
        % (name.encode(), FILES["cmyk.jpg"])
        for name in named
    ]
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = client.post("/v1/embed", content=b"".join(parts) + b"--b--\r\n", headers=headers)
    results = answer.json()["results"]
    assert [result["name"] for result in results] == [*named.values()]
    assert all(result["embedding"] == pytest.approx(results[0]["embedding"], rel=1e-5) for result in results)


def test_too_many_images_are_refused(client):
    answer = client.post("/v1/embed", files=[("files", ("a", FILES["cmyk.jpg"]))] * 9)
    assert (answer.status_code, answer.json()) == (413, {"error": "more than the 8 images allowed in a request"})
    answer = client.post("/v1/embed", json={"images": ["AAAA"] * 9})
    assert (answer.status_code, answer.json()["error"][:8]) == (413, "9 images")


def test_the_answer_says_where_its_time_went(client):
    timing = client.post("/v1/embed", **form(FILES)).headers["server-timing"]
    assert re.fullmatch(r"queue;dur=\d+\.\d\d, decode;dur=\d+\.\d\d, infer;dur=\d+\.\d\d", timing)
    parts = dict(re.findall(r"(\w+);dur=([\d.]+)", timing))
    assert 0 < float(parts["decode"]) < 5000
    assert 0 < float(parts["infer"]) < 5000


def test_the_model_is_described(client):
    assert client.get("/v1/model").json() == {
        "model": "encoder.onnx",
        "space": "space of edges",
        "dim": 12,
        "image_size": 28,
        "classes": CLASSES,
        "index": {"items": 260},
        "limits": {"max_images": 8, "max_body_bytes": 2**25, "max_pixels": 40_000},
    }


def test_the_map_has_one_point_per_image(client, indexed):
    with np.load(indexed / "models/index/space of edges.npz") as arrays:
        places, labels = arrays["places"], json.loads(arrays["about"].tobytes())["labels"]
    answer = client.get("/v1/index/map").json()
    assert answer["labels"] == sorted(set(labels) - {None})
    assert [point[0] for point in answer["points"]] == [*range(260)]
    np.testing.assert_allclose([point[1:3] for point in answer["points"]], places, atol=1e-6)
    shown = [answer["labels"][point[3]] if point[3] >= 0 else None for point in answer["points"]]
    assert shown == labels


def test_thumbnails_are_small_jpegs(client):
    for number in (0, 259):
        answer = client.get(f"/v1/index/thumbnails/{number}")
        assert answer.headers["content-type"] == "image/jpeg"
        image = Image.open(io.BytesIO(answer.content))
        assert (image.format, max(image.size)) == ("JPEG", 28)


def test_samples_are_files_that_the_service_can_embed(client):
    samples = client.get("/v1/index/samples").json()["samples"]
    assert [sample["id"] for sample in samples] == [*range(12)]
    assert {sample["label"] for sample in samples} == set(client.get("/v1/index/map").json()["labels"])
    for number in (0, 11):
        content = client.get(f"/v1/index/samples/{number}").content
        assert client.post("/v1/embed", **form({"a": content})).status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("thumbnails/260", 404, "image 260 is not there; the index has 260"),
        ("samples/12", 404, "sample 12 is not there; there are 12"),
        ("thumbnails/-1", 422, "path.number: "),
        ("samples/x", 422, "path.number: "),
        ("thumbnails/99999999999999999999", 422, "path.number: "),
        ("nothing", 404, "Not Found"),
    ],
)
def test_what_is_not_in_the_index_is_not_found(client, path, status, message):
    answer = client.get(f"/v1/index/{path}")
    assert answer.status_code == status
    assert answer.json()["error"].startswith(message)


def ask(app, method, path, **options):
    """Call the application in this process."""

    async def request():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(request())


@pytest.fixture
def bare(tmp_path, mean_onnx):
    """The application with an encoder that has no classes, no index and no image size in its metadata."""
    return app(mean_onnx(tmp_path / "encoder.onnx"), tmp_path / "index", Flags())


def test_without_labels_nothing_is_classified(bare):
    answer = ask(bare, "POST", "/v1/classify", **form({"a": png(1, 2, 3)}))
    assert answer.status_code == 404
    assert answer.json() == {"error": "this encoder has no classifier: there were no labels to fit one"}


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "search"), *(("GET", f"index/{end}") for end in ("map", "samples", "samples/0", "thumbnails/0"))],
)
def test_without_an_index_nothing_is_searched(bare, method, path):
    answer = ask(bare, method, f"/v1/{path}", **(form({"a": png(1, 2, 3)}) if method == "POST" else {}))
    assert answer.status_code == 503
    assert answer.json() == {"error": "there is no index for this encoder: run `barlow index`"}


def test_a_bare_encoder_is_described(bare):
    answer = ask(bare, "GET", "/v1/model").json()
    assert (answer["dim"], answer["classes"], answer["index"], answer["image_size"]) == (3, None, None, None)


def test_an_embedding_is_the_encoders_output_and_nothing_else(bare):
    answer = ask(bare, "POST", "/v1/embed", **form({"a": png(10, 20, 30), "b": png(7, 0, 255, size=(9, 40))}))
    assert [result["embedding"] for result in answer.json()["results"]] == [[10, 20, 30], [7, 0, 255]]


def test_refused_images_are_counted_by_reason(bare):
    ask(bare, "POST", "/v1/embed", **form({"a": BAD["text"][0], "b": png(1, 2, 3), "c": BAD["cut.jpg"][0]}))
    metrics = ask(bare, "GET", "/metrics").text
    assert 'barlow_rejects_total{reason="format"} 1.0' in metrics
    assert 'barlow_rejects_total{reason="damaged"} 1.0' in metrics
