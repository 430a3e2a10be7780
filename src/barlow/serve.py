"""`barlow serve`: an exported encoder over HTTP, for programs (Open Inference Protocol v2), for people, and as a page.

Reads the ONNX file that --model names, and models/index. Another file there, or in a registry's production, replaces
it while requests go on. The token that clients must send is in the environment variable BARLOW_TOKEN, if at all.
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

DRAIN_SECONDS = 30  # for what was asked before SIGTERM
KEEP_ALIVE_SECONDS = 75  # longer than proxies keep an idle connection, so that none sends a request into its end


def run(
    model: Path | str = files.ONNX,
    host: str = "127.0.0.1",
    port: int = 8000,
    index: Path | str = files.INDEX,
    **settings: int,
) -> None:
    """Serve until a signal ends it, and then answer what was asked before.

    Raises:
        UserError: the model cannot be used, a setting is impossible, or the address cannot be listened on.
    """
    if not 0 < port < 2**16:
        raise UserError(f"--port {port} is not allowed; it must be from 1 to {2**16 - 1}")
    application = app(model, index, Flags(**settings), os.environ.get("BARLOW_TOKEN"))
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
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it notes each broken form
    sys.setswitchinterval(0.0005)  # seconds: the event loop and the workers wait for each other often and briefly
    gc.freeze()  # what is there stays; a collection that looks at all of it, or comes often, stops everything else
    gc.set_threshold(50_000, 20, 20)
    uvicorn.Server(config).run([listener])
