"""GET /caprese: what is enabled, and what it has done so far."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

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

            The tokens include rejected drafts, and those that were computed again after a preemption.
            """
            guard = request.app.state.caprese_guard
            if guard is not None and not guard.verify_token(request.headers):
                raise HTTPException(401, "Unauthorized")
            return merge(await request.app.state.caprese_engine.collective_rpc("caprese_report"))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        state.caprese_engine = engine_client
        # vLLM guards its own paths only; GET /caprese wants the same key as /v1.
        tokens = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        state.caprese_guard = AuthenticationMiddleware(self, tokens) if tokens else None
