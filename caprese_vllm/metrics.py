"""The `caprese:` metrics on vLLM's /metrics: what GET /caprese reports, for Prometheus."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import Gauge
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.logger import init_logger

from caprese_kernels.config import layer_spans

from .settings import EngineSettings

logger = init_logger("vllm.caprese")

PATIENCE = 1.0  # seconds that a scrape waits for the workers, who answer between two steps


@dataclass(frozen=True)
class Metric:
    """A metric named caprese:`name`, whose value, or values by its label, is `read(report)`.

    All but statistics_pages and info only grow, from 0 at the server's start.
    """

    name: str
    help: str
    read: Callable[[Mapping[str, Any]], Any]
    label: str | None = None
    core: bool = False  # only where there is a core


METRICS = (
    Metric(
        "generated_tokens_total",
        "Generated tokens by their path: sparse, or off for requests with Caprese off",
        lambda report: {"sparse": report["generated_tokens"], "off": report["off_tokens"]},
        label="path",
    ),
    Metric("neurons_total", "FF neurons of replaced blocks, times sparse tokens", lambda report: report["neurons"]),
    Metric("neurons_kept_total", "Those that the tokens kept", lambda report: report["neurons_kept"]),
    Metric("neurons_core_total", "Those of the core among them", lambda report: report["neurons_core"], core=True),
    Metric(
        "ff_bytes_dense_total",
        "Bytes of the replaced blocks' weights, times sparse tokens",
        lambda report: report["ff_bytes_dense"],
    ),
    Metric(
        "ff_bytes_needed_total",
        "Bytes of weights that the tokens needed: of kept neurons, and of L and R",
        lambda report: report["ff_bytes_needed"],
    ),
    Metric(
        "prompt_mass_outside_core_sum",
        "Prompt tokens' activation mass outside of the core",
        lambda report: report["prompt_mass"][0],
        core=True,
    ),
    Metric(
        "prompt_mass_outside_core_count",
        "Prompt tokens whose activation mass was measured",
        lambda report: report["prompt_mass"][1],
        core=True,
    ),
    Metric(
        "statistics_pages",
        "Pages of statistics that each device has room for",
        lambda report: report["statistics_pages"],
    ),
    Metric(
        "statistics_pages_written_total", "Pages written for cached prefixes", lambda report: report["pages_written"]
    ),
    Metric("statistics_pages_read_total", "Prompts that began with a page", lambda report: report["pages_read"]),
)


@functools.cache  # a process may build several servers, but has one registry
def _gauge(name: str, help: str, *labels: str) -> Gauge:
    """A gauge, also for what only grows: the workers count, and this sets what they have counted.

    "mostrecent": where several API servers run, each knows the same sums, which must not be added.
    """
    return Gauge(f"caprese:{name}", help, labels, multiprocess_mode="mostrecent")


def set_metrics(report: Mapping[str, Any]) -> None:
    """Set the metrics to what a merged report says."""
    has_core = report["core"] > 0 or report["prior"] == 1.0
    for metric in METRICS:
        if metric.core and not has_core:
            continue
        value = metric.read(report)
        if metric.label is None:
            _gauge(metric.name, metric.help).set(value)
        else:
            for key, each in value.items():
                _gauge(metric.name, metric.help, metric.label).labels(key).set(each)


def set_info(settings: EngineSettings) -> None:
    """Set caprese:info to 1, with what is served as its labels: the adapter by its file's name and digest."""
    method = settings.method
    labels = {
        "version": settings.version,
        "method": method.name,
        "density": f"{method.density:g}",
        "rank": str(method.rank),
        "layers": layer_spans(method.layers),
        "score": method.score,
        "prior": f"{method.prior:g}",
        "core": f"{method.core:g}",
        "adapter": Path(settings.weights).name if settings.weights else "none",
        "digest": settings.digest[:12] if settings.digest else "none",
    }
    _gauge("info", "What is served", *labels).labels(**labels).set(1)


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
