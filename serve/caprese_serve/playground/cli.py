"""The verb `playground`."""

from __future__ import annotations

import json
import secrets
import socket
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from caprese_kernels import terminal
from caprese_kernels.errors import CapreseError

from ..address import client_key, server_url
from ..demo import ADAPTERS, MODEL
from ..demo.problems import TASKS, problems
from ..demo.run import ENV, FLAGS, device_flags
from ..server import HOST, VllmServer, get_json
from .app import Playground

LOG = Path("out/playground.log")
EXAMPLES = 6  # problems of each of the demo's tasks


def playground(
    model: Annotated[
        str | None, typer.Argument(help="Model directory or Hub id to serve. Default: the demo's model.")
    ] = None,
    caprese_weights: Annotated[
        str | None,
        typer.Option(help="Its adapter: a file, a directory with one, or a Hub id. Default: none, plain GRIFFIN."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A running server to ask instead, as http://localhost:8000.", metavar="URL")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="The key of that server. Default: OPENAI_API_KEY, VLLM_API_KEY.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes any free one.")] = 8070,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Show the full model's and Caprese's answers side by side, on a page in your browser.

    The page is served on this machine only (127.0.0.1), at a secret address, which is printed.
    """
    if url is not None and (model or caprese_weights):
        raise CapreseError(
            "caprese playground", expected="a model to serve, or --url", found="both", fix="leave one out"
        )
    with _listening(port) as listener, _server(model, caprese_weights, url, api_key) as (server, key):
        pairs = zip(*(problems(task, "test", EXAMPLES) for task in TASKS), strict=True)
        examples = [problem.prompt for pair in pairs for problem in pair]
        secret = secrets.token_urlsafe(16)
        served = Playground(server, key, secret, () if model or url else examples)
        address = f"http://{HOST}:{listener.getsockname()[1]}/{secret}/"
        print(address, flush=True)
        terminal.notes().print("Ctrl-C ends it.")
        if browser:
            webbrowser.open(address)
        config = uvicorn.Config(
            served.app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1
        )
        uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """A socket on which the page will be served. Raises CapreseError for a port in use."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise CapreseError(
                "--port", expected="a free port", found=f"{port}: {error.strerror}", fix="give another, or 0 for any"
            ) from None
        listener.listen()
        yield listener


@contextmanager
def _server(model: str | None, weights: str | None, url: str | None, api_key: str | None) -> Iterator[tuple[str, str]]:
    """(address, key) of the server at `url`, or of one that runs as long as the block."""
    if url is not None:
        get_json(url, "/v1/models", "give the address of a running `caprese serve`", api_key)
        yield server_url(url), client_key(api_key)
        return
    demo = model is None
    weights = weights or (str(ADAPTERS["griffin"]) if demo else None)
    method = {"weights": weights} if weights else {"method": "griffin"}
    caprese = ("--caprese-config", json.dumps({**method, "show_selections": True}))
    flags = (*caprese, *FLAGS, *device_flags()) if demo else caprese
    with VllmServer(model or MODEL, *flags, log=LOG, env=ENV if demo else {}) as server:
        yield server.url, server.api_key
