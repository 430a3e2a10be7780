"""The JSON that the service answers with, as OpenAPI describes it. Nothing is validated on the way out."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from barlow.serving import oip


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
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": text} for status, text in REASONS.items()
}

IMAGES = {
    "requestBody": {
        "required": True,
        "description": "Image files of any format and size.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
                    },
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {
                        "images": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "byte"},
                            "description": "base64 of the files",
                        }
                    },
                }
            },
        },
    }
}

_INPUT = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"const": oip.INPUT},
        "datatype": {"const": "UINT8"},
        "shape": {
            "type": "array",
            "description": "batch, height, width, 3",
            "minItems": 4,
            "maxItems": 4,
            "items": {"type": "integer", "minimum": 1},
            "prefixItems": 3 * [{"type": "integer", "minimum": 1}] + [{"const": 3}],
        },
        "data": {"type": "array", "description": "flat, or nested as the shape"},
        "parameters": {"type": "object"},
    },
}
_BINARY = {
    "application/octet-stream": {
        "schema": {"type": "string", "format": "binary", "description": f"JSON of {oip.HEADER} bytes, then the tensors"}
    }
}
INFERENCE = {
    "parameters": [
        {"name": oip.HEADER, "in": "header", "required": False, "schema": {"type": "integer", "minimum": 0}},
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": _INPUT},
                        "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
                        "parameters": {"type": "object"},
                    },
                }
            },
            **_BINARY,
        },
    },
}
_OUTPUT = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"enum": ["embedding", "logits"]},
        "datatype": {"const": "FP32"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "data": {"type": "array", "description": "flat"},
        "parameters": {"type": "object"},
    },
}
_ANSWER = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "model_name": {"const": "encoder"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {"type": "array", "items": _OUTPUT},
    },
}
INFERRED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {"schema": _ANSWER}, **_BINARY}}}


def number(name: str, default: int, most: int, text: str) -> dict[str, Any]:
    """Describe a query parameter, a whole number from 1 to `most`."""
    schema = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return {"parameters": [{"name": name, "in": "query", "required": False, "description": text, "schema": schema}]}
