"""`barlow serve`: serve an exported encoder over HTTP, with paths for images, the Open Inference Protocol and a page.

Reads the ONNX file that --model names, and models/index. A new file at that path, or a new production version in a
registry, replaces the model while requests go on. If the environment variable BARLOW_TOKEN is set, clients must send
that token.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from pathlib import Path

import uvicorn

from barlow.core import files
from barlow.core.errors import UserError
from barlow.serving.app import app
from barlow.serving.connection import Protocol
from barlow.settings.flags import Flags

DRAIN_SECONDS = 30  # to answer the requests that came before SIGTERM
KEEP_ALIVE_SECONDS = 75  # longer than proxies keep an idle connection, so that the proxy is the one to close it


def run(
    model: Path | str = files.ONNX,
    host: str = "127.0.0.1",
    port: int = 8000,
    index: Path | str = files.INDEX,
    **flags: int,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer the requests that came before and end.

    Raises:
        UserError: the model cannot be used, a flag's value is not allowed, or the address cannot be listened on.
    """
    if not 0 < port < 2**16:
        raise UserError(f"--port {port} is not allowed; it must be from 1 to {2**16 - 1}")
    application = app(model, index, Flags(**flags), os.environ.get("BARLOW_TOKEN"))
    config = uvicorn.Config(
        application,
        http=Protocol,
        loop="uvloop",
        ws="none",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error}); choose another --host or --port") from None
    address = f"[{host}]" if ":" in host else host
    print(f"serving {model} at http://{address}:{port}; its interface is described at /docs", flush=True)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it logs a warning per broken form
    sys.setswitchinterval(0.0005)  # seconds, a tenth of the default: event loop and workers wait for each other often
    gc.freeze()  # the collector stops all threads: it need not look at what exists now, nor run often
    gc.set_threshold(50_000, 20, 20)
    uvicorn.Server(config).run([listener])
