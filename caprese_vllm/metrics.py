"""The Prometheus metric on vLLM's /metrics: how much of the prompts' activation mass falls outside of the core."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable

from prometheus_client import Gauge
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.logger import init_logger

logger = init_logger("vllm.caprese")

NAME = "caprese:prompt_mass_outside_core"
PATIENCE = 1.0  # seconds that a scrape waits for the workers, who answer between two steps


@functools.cache  # a process may build several servers, but has one registry
def gauges() -> tuple[Gauge, Gauge]:
    """Two gauges that only grow: over prompt tokens, the sum of their shares outside of the core, and their number.

    "mostrecent": where several API servers run, each knows the same sums, which must not be added.
    """
    return (
        Gauge(f"{NAME}_sum", "Prompt tokens' activation mass outside of the core", multiprocess_mode="mostrecent"),
        Gauge(f"{NAME}_count", "Prompt tokens whose activation mass was measured", multiprocess_mode="mostrecent"),
    )


class RefreshedMetrics:
    """ASGI middleware: before GET /metrics is answered, `refresh` brings the workers' sums here.

    A scrape waits PATIENCE seconds at most, and is then answered with the sums that the last one saw.
    """

    def __init__(self, app: ASGIApp, refresh: Callable[[], Awaitable[None]]):
        self.app, self.refresh = app, refresh
        self._pending: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics":
            if self._pending is None or self._pending.done():
                self._pending = asyncio.create_task(self._refresh())
            await asyncio.wait({self._pending}, timeout=PATIENCE)
        await self.app(scope, receive, send)

    async def _refresh(self) -> None:
        try:
            await self.refresh()
        except Exception as error:  # a dead engine, which vLLM's own metrics must still show
            logger.warning("Caprese: no report for /metrics: %s", error)
