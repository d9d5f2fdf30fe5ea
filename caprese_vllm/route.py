"""GET /caprese: what is enabled, and what it has done so far."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request

from .state import merge


class CapreseRoute:
    """A vLLM endpoint plugin (vllm.plugins.endpoint_plugins.interface.EndpointPlugin)."""

    name = "caprese"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        @app.get("/caprese")
        async def report(request: Request) -> dict[str, Any]:
            """Method, density, rank, layers, kernel, tokens that ran sparse, and the share of FF weights they needed.

            The tokens include rejected drafts, and those that were computed again after a preemption.
            """
            return merge(await request.app.state.caprese_engine.collective_rpc("caprese_report"))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        state.caprese_engine = engine_client
