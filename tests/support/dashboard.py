"""The Grafana dashboard, examples/grafana.json, as its JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DASHBOARD = json.loads((Path(__file__).parents[2] / "examples/grafana.json").read_text())


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    """The PromQL of every panel."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def metrics_of(dashboard: dict[str, Any]) -> set[str]:
    """Names of all metrics in its panels."""
    return {name for text in expressions(dashboard) for name in re.findall(r"\b(?:caprese|vllm):\w+", text)}
