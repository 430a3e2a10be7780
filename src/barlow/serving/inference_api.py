"""The paths of the Open Inference Protocol, version 2, for programs; `oip` has its format."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Request, Response
from starlette.exceptions import HTTPException

from barlow import __version__
from barlow.serving import oip, schemas
from barlow.serving.engine import Answer, Failure
from barlow.serving.limits import Refusal
from barlow.serving.live import Served

Name = Annotated[str, Path(json_schema_extra={"enum": ["encoder"]})]
router = APIRouter(tags=["Open Inference Protocol"])


@router.get("/v2")
async def server() -> dict[str, Any]:
    """Name the server and what it speaks."""
    return {"name": "barlow", "version": __version__, "extensions": ["binary_tensor_data"]}


@router.get("/v2/health/live")
async def live() -> dict[str, bool]:
    """Say that the process answers."""
    return {"live": True}


@router.get("/v2/health/ready")
async def ready() -> dict[str, bool]:
    """Say that requests are answered: the model is loaded before the first connection is accepted."""
    return {"ready": True}


@router.get("/v2/models/{name}")
@router.get("/v2/models/{name}/versions/{version}", include_in_schema=False)
async def metadata(request: Request, name: Name) -> dict[str, Any]:
    """Describe the model; its name is `encoder`."""
    served = _served(request, name)
    return oip.metadata(served.encoder, served.name)


@router.get("/v2/models/{name}/ready")
@router.get("/v2/models/{name}/versions/{version}/ready", include_in_schema=False)
async def model_ready(request: Request, name: Name) -> dict[str, Any]:
    """Say that the model answers."""
    served = _served(request, name)
    return {"name": name, "version": served.name, "ready": True}


@router.post("/v2/models/{name}/infer", responses=schemas.INFERRED, openapi_extra=schemas.INFERENCE)
@router.post("/v2/models/{name}/versions/{version}/infer", include_in_schema=False)
async def infer(request: Request, name: Name) -> Response:
    """Embed a tensor of images, UINT8 [batch, height, width, 3]; tensors as JSON or binary."""
    served, settings = _served(request, name), request.app.state.settings
    known = oip.outputs(served.encoder)
    asked = oip.parse(await request.body(), request.headers.get(oip.HEADER), [*known], settings)
    job = await served.engine.submit(list(asked.images))
    for answer in job.answers:
        if isinstance(answer, Failure):
            raise Refusal(*answer)
    answers = [answer for answer in job.answers if isinstance(answer, Answer)]
    tensors = {output: np.stack([getattr(answer, output) for answer in answers]) for output in known}
    body, headers = oip.render(asked, tensors, served.name)
    return Response(body, headers=headers)


def _served(request: Request, name: str) -> Served:
    served: Served = request.app.state.live.current
    version = request.path_params.get("version")
    if name != "encoder" or version not in (None, served.name):
        wanted = name if version is None else f"{name} version {version}"
        raise HTTPException(404, f"model {wanted[:50]!r} is not here; there is 'encoder' version {served.name!r}")
    return served


DIRECT = {"/v2/models/encoder/infer": partial(infer, name="encoder")}
