"""`caprese doctor`: does every FF block compute what it should, with these weights on this machine?

An engine is started as for serving, without its own start-up check; each of its workers then compares all of its blocks
with plain arithmetic on their weights (`caprese_kernels.self_check`).
"""

from __future__ import annotations

import math
import os
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from caprese_kernels import files
from caprese_kernels.errors import CapreseError
from caprese_kernels.json_text import parse_json

from . import environment


def examine(model: str, weights: str | None = None, engine: str | None = None) -> dict[str, Any]:
    """The environment, what is enabled, and every block's errors, as JSON values; `passed` says whether all are small.

    `engine` has arguments of vllm.LLM as JSON. Raises CapreseError for what a server would refuse.
    """
    files.check_model(model)
    options = _engine_options(engine)
    caprese: dict[str, Any] = {"weights": weights} if weights else {"method": "griffin", "layers": "all"}
    caprese["start_up_check"] = False
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm import LLM
    except ImportError as error:
        raise CapreseError(
            "vLLM", expected="an installation that can be imported", found=str(error), fix="install it, or repair it"
        ) from None
    # Kernels alone are examined: graphs would only take time, and a short context leaves the memory to the weights.
    defaults = {"enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2}
    llm = LLM(model, **{**defaults, **options, "additional_config": {"caprese": caprese}})
    try:
        reports = llm.collective_rpc("caprese_report")
        found = llm.collective_rpc("caprese_check")
        dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    finally:
        llm.llm_engine.engine_core.shutdown()
    blocks = [
        {"worker": worker, "layer": int(layer), **{key: _finite(value) for key, value in check.items()}}
        for worker, checks in enumerate(found)
        for layer, check in sorted(checks.items())
    ]
    settings = ("method", "density", "rank", "score", "prior", "core", "layers", "kernel", "tensor_parallel_size")
    return {
        "model": model,
        "weights": weights,
        "dtype": dtype,
        **{key: reports[0][key] for key in settings},
        "blocks": blocks,
        "passed": bool(blocks) and all(block["passed"] for block in blocks),
        "environment": environment.collect(),
    }


def render(report: dict[str, Any]) -> list[RenderableType]:
    """The report as tables, with the verdict last."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    for key in ("model", "weights", "dtype", "method", "density", "rank", "score", "prior", "core", "kernel"):
        facts.add_row(key, "none" if report[key] is None else str(report[key]))
    facts.add_row("workers", str(1 + max((block["worker"] for block in report["blocks"]), default=0)))
    table = Table("worker", "layer", box=None, pad_edge=False)
    for column in ("error, sparse", "error, off", "allowed"):
        table.add_column(column, justify="right")
    table.add_column("")
    for block in report["blocks"]:
        errors = ("not finite" if block[key] is None else f"{block[key]:.2e}" for key in ("sparse", "dense"))
        verdict = "" if block["passed"] else "WRONG"
        table.add_row(str(block["worker"]), str(block["layer"]), *errors, f"{block['tolerance']:g}", verdict)
    wrong = sum(not block["passed"] for block in report["blocks"])
    verdict = f"{len(report['blocks'])} FF blocks examined: " + (
        f"{wrong} WRONG, report all of this" if wrong else "all right"
    )
    return [environment.render(report["environment"]), "", facts, "", table, "", verdict]


def _engine_options(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = parse_json(text)
    except ValueError as error:
        raise CapreseError(
            "--engine", expected="a JSON object", found=str(error), fix="quote it for the shell"
        ) from None
    if not isinstance(found, dict) or "additional_config" in found:
        raise CapreseError(
            "--engine",
            expected="a JSON object without additional_config",
            found=type(found).__name__,
            fix="correct it",
        )
    return found


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
