"""The paths for image files under /v1: embed, classify and search, and what the page at / needs besides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import orjson
from pydantic import Field, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from barlow.encoder.encoder import softmax
from barlow.encoder.search import Index
from barlow.serving import forms
from barlow.serving.engine import Answer, Failure
from barlow.serving.limits import RequestError
from barlow.serving.live import Live, Served
from barlow.serving.schemas import TOP, K
from barlow.settings.flags import Flags

MAP_POINTS = 3000
NO_INDEX = "there is no index for this encoder: run `barlow index`"
INDEX_NUMBER = TypeAdapter(Annotated[int, Field(ge=0, lt=2**31)])
Render = Callable[[Sequence[Answer]], "list[dict[str, Any]]"]  # the results' fields, one dictionary per answer


async def model(request: Request) -> Response:
    """Say what is served."""
    served, flags = _served(request), _flags(request)
    description = {
        "model": served.name,
        "space": served.space,
        "dim": served.encoder.dim,
        "image_size": int(served.encoder.metadata.get("image_size", 0)) or None,
        "classes": served.encoder.classes,
        "index": {"items": len(served.index)} if served.index else None,
        "limits": {name: getattr(flags, name) for name in ("max_images", "max_body_bytes", "max_pixels")},
    }
    return _json(description)


async def embed(request: Request) -> Response:
    """Embed images."""
    return await _respond(
        request, _served(request), lambda answers: [{"embedding": answer.embedding} for answer in answers]
    )


async def classify(request: Request) -> Response:
    """Name the classes of images."""
    served, top = _served(request), _query_number(request, TOP)
    classes = served.encoder.classes
    if classes is None:
        raise RequestError(404, "classifier", "this encoder has no classifier: there were no labels to fit one")

    def render(answers: Sequence[Answer]) -> list[dict[str, Any]]:
        results = []
        for answer in answers:
            assert answer.logits is not None
            probabilities = softmax(answer.logits)
            order = np.argsort(-probabilities, kind="stable")[:top].tolist()
            best = [{"class": classes[i], "probability": float(probabilities[i])} for i in order]
            results.append({**best[0], "probabilities": best})
        return results

    return await _respond(request, served, render)


async def search(request: Request) -> Response:
    """Find the most similar images of the index."""
    served, k = _served(request), _query_number(request, K)
    index = _index(served)

    def render(answers: Sequence[Answer]) -> list[dict[str, Any]]:
        embeddings = np.stack([answer.embedding for answer in answers])
        results = []
        for ids, similarities, place in zip(*index.search(embeddings, k), index.place(embeddings), strict=True):
            neighbours = [
                {"id": i, "name": index.names[i], "label": index.labels[i], "similarity": float(similarity)}
                for i, similarity in zip(ids.tolist(), similarities, strict=True)
            ]
            results.append({"position": place, "neighbours": neighbours})
        return results

    return await _respond(request, served, render, in_thread=True)


async def map_of_index(request: Request) -> Response:
    """Return points of the map, at most 3,000, spread evenly: number, x, y and label's number (-1: none)."""
    index = _index(_served(request))
    labels = sorted({label for label in index.labels if label is not None})
    numbers = {label: i for i, label in enumerate(labels)}
    chosen = np.unique(np.linspace(0, len(index) - 1, MAP_POINTS).astype(int)).tolist()
    points = [[i, *index.places[i].tolist(), numbers.get(index.labels[i] or "", -1)] for i in chosen]
    return _json({"labels": labels, "points": points})


async def thumbnail(request: Request) -> Response:
    """Return an image of the index, small."""
    number = _path_number(request)
    index = _index(_served(request))
    if number >= len(index):
        raise HTTPException(404, f"image {number} is not there; the index has {len(index)}")
    return Response(index.thumbnail(number), media_type="image/jpeg", headers={"Cache-Control": "no-cache"})


async def samples(request: Request) -> Response:
    """Return a few images to try the service with."""
    items = enumerate(_index(_served(request)).samples)
    return _json({"samples": [{"id": i, "name": item.name, "label": item.label} for i, item in items]})


async def sample(request: Request) -> Response:
    """Return one of them, as its file is."""
    number = _path_number(request)
    items = _index(_served(request)).samples
    if number >= len(items):
        raise HTTPException(404, f"sample {number} is not there; there are {len(items)}")
    return Response(items[number].image, media_type="application/octet-stream")


async def _respond(request: Request, served: Served, render: Render, in_thread: bool = False) -> Response:
    """Embed the request's images and answer with one result per image; if all are bad, with the first one's error."""
    content_type, flags = request.headers.get("content-type", ""), _flags(request)
    names, images = forms.images(content_type, await request.body(), flags.max_images)
    job = await served.engine.submit(images)
    good = [answer for answer in job.answers if isinstance(answer, Answer)]
    bad = [answer for answer in job.answers if isinstance(answer, Failure)]
    for failure in bad:
        request.app.state.metrics.rejects.labels(failure.reason).inc()
    if not good:
        return _json({"error": f"{names[0]}: {bad[0].message}"}, bad[0].status)
    rendered = iter(await asyncio.to_thread(render, good) if in_thread else render(good))
    results = [
        {"name": name, "error": answer.message, "status": answer.status}
        if isinstance(answer, Failure)
        else {"name": name, **next(rendered)}
        for name, answer in zip(names, job.answers, strict=True)
    ]
    body = {"model": served.name, "space": served.space, "dim": served.encoder.dim, "results": results}
    parts = {"queue": job.queue, "decode": job.decode, "infer": job.infer}
    timing = ", ".join(f"{name};dur={1000 * seconds:.2f}" for name, seconds in parts.items())
    return _json(body, headers={"Server-Timing": timing})


def _query_number(request: Request, parameter: dict[str, Any]) -> int:
    """Return the value of a query parameter that `schemas.number` describes."""
    name, schema = parameter["name"], parameter["schema"]
    least, most = schema["minimum"], schema["maximum"]
    text = request.query_params.get(name, str(schema["default"]))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and least <= int(text) <= most):
        raise RequestError(422, "parameter", f"{name}={text[:20]}; it must be from {least} to {most}")
    return int(text)


def _path_number(request: Request) -> int:
    """Return the number in the path."""
    try:
        return INDEX_NUMBER.validate_python(request.path_params["number"])
    except ValidationError as error:
        raise HTTPException(422, f"path.number: {error.errors()[0]['msg']}") from None


def _served(request: Request) -> Served:
    live: Live = request.app.state.live
    return live.current


def _flags(request: Request) -> Flags:
    flags: Flags = request.app.state.flags
    return flags


def _index(served: Served) -> Index:
    if served.index is None:
        raise RequestError(503, "index", NO_INDEX)
    return served.index


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, headers, media_type="application/json")


ROUTES = [
    Route("/v1/embed", embed, methods=["POST"]),
    Route("/v1/classify", classify, methods=["POST"]),
    Route("/v1/search", search, methods=["POST"]),
    Route("/v1/model", model),
    Route("/v1/index/map", map_of_index),
    Route("/v1/index/thumbnails/{number}", thumbnail),
    Route("/v1/index/samples", samples),
    Route("/v1/index/samples/{number}", sample),
]
