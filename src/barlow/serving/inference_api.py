"""The paths of the Open Inference Protocol, version 2, under /v2; `oip` reads and writes its bodies."""

from __future__ import annotations

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from barlow import __version__
from barlow.serving import oip
from barlow.serving.engine import Answer, Failure
from barlow.serving.limits import RequestError
from barlow.serving.live import Served


async def server(_: Request) -> Response:
    """Name the server and what it speaks."""
    return JSONResponse({"name": "barlow", "version": __version__, "extensions": ["binary_tensor_data"]})


async def live(_: Request) -> Response:
    """Say that the process answers."""
    return JSONResponse({"live": True})


async def ready(_: Request) -> Response:
    """Say that requests are answered: the model is loaded before the first connection is accepted."""
    return JSONResponse({"ready": True})


async def metadata(request: Request) -> Response:
    """Describe the model; its name is `encoder`."""
    served = _served(request)
    return JSONResponse(oip.metadata(served.encoder, served.name))


async def model_ready(request: Request) -> Response:
    """Say that the model answers."""
    served = _served(request)
    return JSONResponse({"name": "encoder", "version": served.name, "ready": True})


async def infer(request: Request) -> Response:
    """Embed a tensor of images, UINT8 or UINT16 [batch, height, width, channels]; tensors as JSON or binary."""
    served = _served(request)
    outputs = oip.outputs(served.encoder)
    header = request.headers.get(oip.HEADER)
    inference = oip.parse(await request.body(), header, [*outputs], request.app.state.flags, served.encoder.form)
    job = await served.engine.submit(list(inference.images))
    for answer in job.answers:
        if isinstance(answer, Failure):
            raise RequestError(*answer)
    answers = [answer for answer in job.answers if isinstance(answer, Answer)]
    tensors = {output: np.stack([getattr(answer, output) for answer in answers]) for output in outputs}
    body, headers = oip.render(inference, tensors, served.name)
    return Response(body, headers=headers)


def _served(request: Request) -> Served:
    """Return the model of the path; raises HTTPException 404 where the path names another one."""
    served: Served = request.app.state.live.current
    name, version = request.path_params.get("name", "encoder"), request.path_params.get("version")
    if name != "encoder" or version not in (None, served.name):
        wanted = name if version is None else f"{name} version {version}"
        raise HTTPException(404, f"model {wanted[:50]!r} is not here; there is 'encoder' version {served.name!r}")
    return served


ROUTES = [
    Route("/v2/models/encoder/infer", infer, methods=["POST"]),  # a path of its own in the metrics
    Route("/v2/models/{name}/infer", infer, methods=["POST"]),
    Route("/v2/models/{name}/versions/{version}/infer", infer, methods=["POST"]),
    Route("/v2", server),
    Route("/v2/health/live", live),
    Route("/v2/health/ready", ready),
    Route("/v2/models/{name}", metadata),
    Route("/v2/models/{name}/versions/{version}", metadata),
    Route("/v2/models/{name}/ready", model_ready),
    Route("/v2/models/{name}/versions/{version}/ready", model_ready),
]
