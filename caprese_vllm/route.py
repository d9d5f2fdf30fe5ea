"""GET /caprese: what is enabled, and what it has done so far; and its part of GET /metrics."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from .metrics import RefreshedMetrics, gauges
from .settings import EngineSettings
from .state import merge
from .switch import SwitchMiddleware


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
            guard = request.app.state.caprese_guard
            if guard is not None and not guard.verify_token(request.headers):
                raise HTTPException(401, "Unauthorized")
            return await _report(request.app.state)

        async def refresh() -> None:
            if app.state.caprese_core:
                for gauge, value in zip(gauges(), (await _report(app.state))["prompt_mass"], strict=True):
                    gauge.set(value)

        app.add_middleware(RefreshedMetrics, refresh=refresh)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        # A server that only renders prompts has no engine.
        settings = None if engine_client is None else EngineSettings.read(engine_client.vllm_config)
        state.caprese_engine = engine_client
        state.caprese_settings = settings
        state.caprese_core = settings is not None and settings.method.has_core
        if state.caprese_core:
            gauges()  # there from the first scrape on
        # vLLM guards its own paths only; GET /caprese wants the same key as /v1.
        tokens = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        state.caprese_guard = AuthenticationMiddleware(self, tokens) if tokens else None


async def _report(state: Any) -> dict[str, Any]:
    return merge(await state.caprese_engine.collective_rpc("caprese_report"))
