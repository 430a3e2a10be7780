"""The OpenAPI description of the service, built once at start. It validates neither requests nor answers.

The models are the answers of the paths under /v1; plain dictionaries describe the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from barlow.serving import oip

Schema = dict[str, Any]  # a part of the document, as JSON
_REFERENCE = "#/components/schemas/{model}"


class Failure(BaseModel):
    """What every error looks like."""

    error: str


class Result(BaseModel):
    """One image's part of an answer: either the fields that follow, or error and status."""

    name: str = Field(description="as the client named the file")
    error: str | None = Field(None, description="why there is nothing for this image")
    status: int | None = Field(None, description="as it would be if this image were alone")


class Probability(BaseModel):
    """A class."""

    class_: str = Field(alias="class")
    probability: float


class Embedding(Result):
    """An embedding."""

    embedding: list[float] | None = None


class Classification(Result):
    """The most probable class, and the `top` most probable ones."""

    class_: str | None = Field(None, alias="class")
    probability: float | None = None
    probabilities: list[Probability] | None = None


class Neighbour(BaseModel):
    """An image of the index."""

    id: int
    name: str
    label: str | None
    similarity: float = Field(description="cosine, -1 to 1")


class Search(Result):
    """The nearest images, the nearest first, and the place on the map."""

    position: list[float] | None = None
    neighbours: list[Neighbour] | None = None


class Answer(BaseModel):
    """What every answer says of the encoder; embeddings of different spaces cannot be compared."""

    model: str
    space: str


class Embeddings(Answer):
    """Answer of /v1/embed."""

    dim: int
    results: list[Embedding]


class Classifications(Answer):
    """Answer of /v1/classify."""

    results: list[Classification]


class Searches(Answer):
    """Answer of /v1/search."""

    results: list[Search]


REASONS = {
    400: "The request is not as described",
    401: "The bearer token is missing or wrong",
    404: "There is no such thing",
    408: "The body came too slowly",
    413: "Too many bytes, images or pixels",
    415: "Not an image in a known format, or another content type than described",
    422: "An image that is damaged, or a parameter out of range",
    429: "Too many requests at a time",
    500: "A bug",
    503: "The queue is full, the time is over, or there is no index",
}


def _object(required: str, **properties: Schema) -> Schema:
    return {"type": "object", "required": required.split(), "properties": properties}


def _array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _model(model: type[BaseModel]) -> Schema:
    return _json({"$ref": _REFERENCE.format(model=model.__name__)})


def _anything(title: str, values: Schema | bool = True) -> Schema:
    """Describe JSON of an answer that no model describes."""
    return _json({"type": "object", "additionalProperties": values, "title": f"Response {title} Get"})


def _parameter(name: str, where: str, schema: Schema, **more: Any) -> Schema:
    return {"name": name, "in": where, "required": where == "path", "schema": schema, **more}


def number(name: str, default: int, most: int, text: str) -> Schema:
    """Describe a query parameter, a whole number from 1 to `most`."""
    schema = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return _parameter(name, "query", schema, description=text)


TOP = number("top", 5, 1000, "classes to name")
K = number("k", 10, 100, "neighbours to return")
_NUMBER = {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31, "title": "Number"}
_NAME = {"type": "string", "enum": ["encoder"], "title": "Name"}
_IN_PATHS: dict[str, Schema] = {"number": _NUMBER, "name": _NAME}
_HEADER = _parameter(oip.HEADER, "header", {"type": "integer", "minimum": 0})
_BYTES = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "format": "byte"}
_IMAGES = {
    "required": True,
    "description": "Image files of any format and size.",
    "content": {
        "multipart/form-data": {"schema": _object("files", files=_array(_BYTES, minItems=1))},
        **_json(_object("images", images=_array(_BASE64, minItems=1, description="base64 of the files"))),
    },
}
_SIDE = {"type": "integer", "minimum": 1}
_SHAPE = _array(_SIDE, description="batch, height, width, channels", minItems=4, maxItems=4)
_PARAMETERS = {"type": "object"}
_INPUT = _object(
    "name shape datatype",
    name={"const": oip.INPUT},
    datatype={"enum": ["UINT8", "UINT16"]},
    shape=_SHAPE,
    data={"type": "array", "description": "flat, or nested as the shape"},
    parameters=_PARAMETERS,
)
_WANTED = _array({"type": "object", "required": ["name"]})
_INPUTS = _array(_INPUT, minItems=1, maxItems=1)
_INFERENCE = _object("inputs", id={"type": "string"}, inputs=_INPUTS, outputs=_WANTED, parameters=_PARAMETERS)
_OUTPUT = _object(
    "name datatype shape",
    name={"enum": ["embedding", "logits"]},
    datatype={"const": "FP32"},
    shape=_array({"type": "integer"}),
    data={"type": "array", "description": "flat"},
    parameters=_PARAMETERS,
)
_INFERRED = _object(
    "model_name model_version outputs",
    model_name={"const": "encoder"},
    model_version={"type": "string"},
    id={"type": "string"},
    outputs=_array(_OUTPUT),
)
_BINARY = {**_BYTES, "description": f"JSON of {oip.HEADER} bytes, then the tensors"}
_TENSORS = {"application/octet-stream": {"schema": _BINARY}}


class Operation(NamedTuple):
    """What OpenAPI says of a path beyond the name and docstring of its endpoint."""

    answer: Schema  # of status 200, by media type
    body: Schema | None = None
    parameters: tuple[Schema, ...] = ()  # besides those in the path


_ITEMS = _array({"type": "object", "additionalProperties": True})
OPERATIONS = {
    "/metrics": Operation({"text/plain": {}}),
    "/v1/model": Operation(_anything("Model V1 Model")),
    "/v1/embed": Operation(_model(Embeddings), _IMAGES),
    "/v1/classify": Operation(_model(Classifications), _IMAGES, (TOP,)),
    "/v1/search": Operation(_model(Searches), _IMAGES, (K,)),
    "/v1/index/map": Operation(_json({})),
    "/v1/index/thumbnails/{number}": Operation({"image/jpeg": {}}),
    "/v1/index/samples": Operation(_anything("Samples V1 Index Samples", _ITEMS)),
    "/v1/index/samples/{number}": Operation({"application/octet-stream": {}}),
    "/v2": Operation(_anything("Server V2")),
    "/v2/health/live": Operation(_anything("Live V2 Health Live", {"type": "boolean"})),
    "/v2/health/ready": Operation(_anything("Ready V2 Health Ready", {"type": "boolean"})),
    "/v2/models/{name}": Operation(_anything("Metadata V2 Models  Name ")),
    "/v2/models/{name}/ready": Operation(_anything("Model Ready V2 Models  Name  Ready")),
    "/v2/models/{name}/infer": Operation(
        {**_json(_INFERRED), **_TENSORS}, {"required": True, "content": {**_json(_INFERENCE), **_TENSORS}}, (_HEADER,)
    ),
}
_TAGS = {"v1": ["images"], "v2": ["Open Inference Protocol"]}


def openapi(title: str, version: str, routes: Sequence[Route]) -> Schema:
    """Return the OpenAPI document of OPERATIONS; `routes` have an endpoint for each of them."""
    failures = {str(status): {"description": text, "content": _model(Failure)} for status, text in REASONS.items()}
    by_path, paths = {route.path: route for route in routes}, {}
    for path, operation in OPERATIONS.items():
        route = by_path[path]
        method, name = "post" if "POST" in (route.methods or ()) else "get", route.endpoint.__name__
        in_path = [_parameter(key, "path", _IN_PATHS[key]) for key in route.param_convertors]
        described = {
            "tags": _TAGS.get(path.split("/")[1]),
            "summary": name.replace("_", " ").title(),
            "description": route.endpoint.__doc__,
            "operationId": f"{name}{re.sub(r'[^a-z0-9]', '_', path)}_{method}",
            "parameters": [*in_path, *operation.parameters] or None,
            "requestBody": operation.body,
            "responses": {"200": {"description": "Successful Response", "content": operation.answer}} | failures,
        }
        paths[path] = {method: {key: value for key, value in described.items() if value is not None}}
    models = (Failure, Embeddings, Classifications, Searches)
    _, definitions = models_json_schema([(model, "serialization") for model in models], ref_template=_REFERENCE)
    schemas = definitions["$defs"]
    for schema in schemas.values():
        for field in schema["properties"].values():
            field.pop("default", None)  # a field without a value is left out of the answer
    info = {"title": title, "version": version}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}
