"""GET /caprese: what is enabled, and what it has done so far; selections of requests; its part of GET /metrics."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Path, Request
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from .metrics import RefreshedMetrics, set_info, set_metrics
from .selections import merge_selections
from .settings import EngineSettings
from .state import merge
from .switch import SwitchMiddleware

MAX_ID = 256  # characters of a request's id


class CapreseRoute:
    """A vLLM endpoint plugin (vllm.plugins.endpoint_plugins.interface.EndpointPlugin)."""

    name = "caprese"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(SwitchMiddleware)

        @app.get("/caprese")
        async def report(request: Request) -> dict[str, Any]:
            """Method, density, rank, layers, kernel, tokens that ran sparse, and the share of FF weights they needed.

            The tokens include rejected drafts, and those that were computed again after a preemption. With a core, the
            share of the prompts' activation mass outside of it, in the middle one of the sparse layers. The interval of
            reselection, and how many rounds there were.
            """
            _authorize(request)
            return await _report(request.app.state)

        @app.get("/caprese/selections/{request_id}")
        async def selections(request: Request, request_id: Annotated[str, Path(max_length=MAX_ID)]) -> dict[str, Any]:
            """Which neurons the request selected, while it runs and a little after; with `show_selections` only.

            For GRIFFIN, `core` and `tail` of each sparse layer: shares of its bins of neurons. For CATS, `threshold`.
            """
            _authorize(request)
            if not request.app.state.caprese_shows:
                raise HTTPException(404, "Selections are not shown: serve with --caprese-config.show_selections true")
            parts = await request.app.state.caprese_engine.collective_rpc("caprese_selections", args=(request_id,))
            found = merge_selections(parts)
            if found is None:
                raise HTTPException(404, "No selection of such a request: it ran dense, is too old, or not there yet")
            return found

        async def refresh() -> None:
            if app.state.caprese_engine is not None:
                set_metrics(await _report(app.state))

        app.add_middleware(RefreshedMetrics, refresh=refresh)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        # A server that only renders prompts has no engine.
        settings = None if engine_client is None else EngineSettings.read(engine_client.vllm_config)
        state.caprese_engine = engine_client
        state.caprese_settings = settings
        state.caprese_shows = settings is not None and settings.show_selections
        if settings is not None:
            set_info(settings)
        # vLLM guards its own paths only; GET /caprese wants the same key as /v1.
        tokens = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        state.caprese_guard = AuthenticationMiddleware(self, tokens) if tokens else None


def _authorize(request: Request) -> None:
    """Answer status 401 unless the request has the server's API key, if there is one."""
    guard = request.app.state.caprese_guard
    if guard is not None and not guard.verify_token(request.headers):
        raise HTTPException(401, "Unauthorized")


async def _report(state: Any) -> dict[str, Any]:
    return merge(await state.caprese_engine.collective_rpc("caprese_report"))
