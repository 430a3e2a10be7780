"""The paths for people: /v1/embed, /v1/classify and /v1/search, and what the page needs besides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Path, Request, Response
from starlette.exceptions import HTTPException

from barlow.encoder.encoder import softmax
from barlow.encoder.search import Index
from barlow.serving import forms, schemas
from barlow.serving.engine import Answer, Failure
from barlow.serving.limits import Refusal
from barlow.serving.live import Live, Served
from barlow.settings.flags import Flags

MAP_POINTS = 3000
NO_INDEX = "there is no index for this encoder: run `barlow index`"
TOP = schemas.number("top", 5, 1000, "classes to name")
K = schemas.number("k", 10, 100, "neighbours to return")
Number = Annotated[int, Path(ge=0, lt=2**31)]
Tell = Callable[[Sequence[Answer]], "list[dict[str, Any]]"]
router = APIRouter(tags=["images"])


@router.get("/v1/model")
async def model(request: Request) -> dict[str, Any]:
    """Say what is served."""
    served, settings = _served(request), _settings(request)
    return {
        "model": served.name,
        "space": served.space,
        "dim": served.encoder.dim,
        "image_size": int(served.encoder.metadata.get("image_size", 0)) or None,
        "classes": served.encoder.classes,
        "index": {"items": len(served.index)} if served.index else None,
        "limits": {name: getattr(settings, name) for name in ("max_images", "max_body_bytes", "max_pixels")},
    }


@router.post("/v1/embed", response_model=schemas.Embeddings, openapi_extra=schemas.IMAGES)
async def embed(request: Request) -> Response:
    """Embed images."""
    return await _answer(request, _served(request), lambda found: [{"embedding": answer.embedding} for answer in found])


@router.post("/v1/classify", response_model=schemas.Classifications, openapi_extra=schemas.IMAGES | TOP)
async def classify(request: Request) -> Response:
    """Name the classes of images."""
    served, top = _served(request), _number(request, TOP)
    classes = served.encoder.classes
    if classes is None:
        raise Refusal(404, "classifier", "this encoder has no classifier: there were no labels to fit one")

    def tell(found: Sequence[Answer]) -> list[dict[str, Any]]:
        told = []
        for answer in found:
            assert answer.logits is not None
            probabilities = softmax(answer.logits)
            order = np.argsort(-probabilities, kind="stable")[:top].tolist()
            best = [{"class": classes[i], "probability": float(probabilities[i])} for i in order]
            told.append({**best[0], "probabilities": best})
        return told

    return await _answer(request, served, tell)


@router.post("/v1/search", response_model=schemas.Searches, openapi_extra=schemas.IMAGES | K)
async def search(request: Request) -> Response:
    """Find the most similar images of the index."""
    served, k = _served(request), _number(request, K)
    index = _index(served)

    def tell(found: Sequence[Answer]) -> list[dict[str, Any]]:
        embeddings = np.stack([answer.embedding for answer in found])
        told = []
        for ids, similarities, place in zip(*index.search(embeddings, k), index.place(embeddings), strict=True):
            near = [
                {"id": i, "name": index.names[i], "label": index.labels[i], "similarity": float(similarity)}
                for i, similarity in zip(ids.tolist(), similarities, strict=True)
            ]
            told.append({"position": place, "neighbours": near})
        return told

    return await _answer(request, served, tell, in_thread=True)


@router.get("/v1/index/map")
async def map_of_index(request: Request) -> Response:
    """Return points of the map, at most 3,000, spread evenly: number, x, y and label's number (-1: none)."""
    index = _index(_served(request))
    labels = sorted({label for label in index.labels if label is not None})
    numbers = {label: i for i, label in enumerate(labels)}
    chosen = np.unique(np.linspace(0, len(index) - 1, MAP_POINTS).astype(int)).tolist()
    points = [[i, *index.places[i].tolist(), numbers.get(index.labels[i] or "", -1)] for i in chosen]
    return _json({"labels": labels, "points": points})


@router.get("/v1/index/thumbnails/{number}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
async def thumbnail(request: Request, number: Number) -> Response:
    """Return an image of the index, small."""
    index = _index(_served(request))
    if number >= len(index):
        raise HTTPException(404, f"image {number} is not there; the index has {len(index)}")
    return Response(index.thumbnail(number), media_type="image/jpeg", headers={"Cache-Control": "no-cache"})


@router.get("/v1/index/samples")
async def samples(request: Request) -> dict[str, list[dict[str, Any]]]:
    """Return a few images to try the service with."""
    found = enumerate(_index(_served(request)).samples)
    return {"samples": [{"id": i, "name": item.name, "label": item.label} for i, item in found]}


@router.get(
    "/v1/index/samples/{number}",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def sample(request: Request, number: Number) -> Response:
    """Return one of them, as its file is."""
    found = _index(_served(request)).samples
    if number >= len(found):
        raise HTTPException(404, f"sample {number} is not there; there are {len(found)}")
    return Response(found[number].image, media_type="application/octet-stream")


async def _answer(request: Request, served: Served, tell: Tell, in_thread: bool = False) -> Response:
    """Have the images embedded and `tell` of the good ones; if all are bad, answer with the first's error."""
    content_type, settings = request.headers.get("content-type", ""), _settings(request)
    names, images = forms.images(content_type, await request.body(), settings.max_images)
    job = await served.engine.submit(images)
    good = [answer for answer in job.answers if isinstance(answer, Answer)]
    bad = [answer for answer in job.answers if isinstance(answer, Failure)]
    for failure in bad:
        request.app.state.metrics.rejects.labels(failure.reason).inc()
    if not good:
        return _json({"error": f"{names[0]}: {bad[0].message}"}, bad[0].status)
    told = iter(await asyncio.to_thread(tell, good) if in_thread else tell(good))
    results = [
        {"name": name, "error": answer.message, "status": answer.status}
        if isinstance(answer, Failure)
        else {"name": name, **next(told)}
        for name, answer in zip(names, job.answers, strict=True)
    ]
    body = {"model": served.name, "space": served.space, "dim": served.encoder.dim, "results": results}
    parts = {"queue": job.queue, "decode": job.decode, "infer": job.infer}
    timing = ", ".join(f"{name};dur={1000 * seconds:.2f}" for name, seconds in parts.items())
    return _json(body, headers={"Server-Timing": timing})


def _number(request: Request, parameters: dict[str, Any]) -> int:
    """Return the one query parameter that is described."""
    described = parameters["parameters"][0]
    name, schema = described["name"], described["schema"]
    text = request.query_params.get(name, str(schema["default"]))
    if not (
        text.isascii() and text.isdigit() and len(text) < 9 and schema["minimum"] <= int(text) <= schema["maximum"]
    ):
        raise Refusal(
            422, "parameter", f"{name}={text[:20]}; it must be from {schema['minimum']} to {schema['maximum']}"
        )
    return int(text)


def _served(request: Request) -> Served:
    live: Live = request.app.state.live
    return live.current


def _settings(request: Request) -> Flags:
    settings: Flags = request.app.state.settings
    return settings


def _index(served: Served) -> Index:
    if served.index is None:
        raise Refusal(503, "index", NO_INDEX)
    return served.index


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, headers, media_type="application/json")


DIRECT = {"/v1/embed": embed, "/v1/classify": classify, "/v1/search": search}
