"""`caprese doctor`: does every FF block compute what it should, with these weights on this machine?

An engine is started as for serving, without its own start-up check; each of its workers then compares all of its blocks
with plain arithmetic on their weights (`caprese_kernels.self_check`).
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from caprese_kernels import files
from caprese_kernels.errors import CapreseError, printable, quote
from caprese_kernels.json_text import parse_json

from . import environment

# Keys of --engine that are given in another way.
_OURS = {"model": "it is the argument of the command", "additional_config": "Caprese's settings are made here"}
_ERRORS = ("sparse", "dense", "selection")


def examine(model: str, weights: str | None = None, engine: str | None = None) -> dict[str, Any]:
    """The environment, what is enabled, and every block's errors, as JSON values; `passed` says whether all are small.

    `engine` has arguments of vllm.LLM as JSON. Raises CapreseError for what a server would refuse.
    """
    files.check_model(model)
    options = _engine_options(engine)
    _check_plugin()
    caprese: dict[str, Any] = {"weights": weights} if weights else {"method": "griffin", "layers": "all"}
    caprese["start_up_check"] = False
    try:
        from vllm import LLM
    except ImportError as error:
        raise CapreseError(
            "vLLM", expected="an installation that can be imported", found=str(error), fix="install it, or repair it"
        ) from None
    _check_options(options, LLM)
    # Kernels alone are examined: graphs would only take time, and a short context leaves the memory to the weights.
    defaults = {"enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2}
    try:
        llm = LLM(model, **{**defaults, **options, "additional_config": {"caprese": caprese}})
        try:
            reports = llm.collective_rpc("caprese_report")
            found = llm.collective_rpc("caprese_check")
            dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
        finally:
            llm.llm_engine.engine_core.shutdown()
    except CapreseError:
        raise
    except Exception as error:  # vLLM's own, and whatever ended one of its processes
        raise CapreseError(
            "doctor",
            expected="an engine that starts and checks its blocks",
            found=f"{type(error).__name__}: {printable(next(iter(str(error).splitlines()), ''))[:300]}",
            fix="see what the engine and its workers logged above, or repeat it with VLLM_LOGGING_LEVEL=INFO",
        ) from error
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
    for column in ("error, sparse", "error, off", "allowed", "error, selection"):
        table.add_column(column, justify="right")
    table.add_column("")
    for block in report["blocks"]:
        errors = ("not finite" if block[key] is None else f"{block[key]:.2e}" for key in _ERRORS)
        verdict = "" if block["passed"] else "WRONG"
        sparse, dense, selection = errors
        place = (str(block["worker"]), str(block["layer"]))
        table.add_row(*place, sparse, dense, f"{block['tolerance']:g}", selection, verdict)
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
    if not isinstance(found, dict):
        raise CapreseError("--engine", expected="a JSON object", found=type(found).__name__, fix="correct it")
    for key, instead in _OURS.items():
        if key in found:
            raise CapreseError("--engine", expected=f"no {key}: {instead}", found=key, fix="leave it out")
    return found


def _check_options(options: dict[str, Any], llm: type) -> None:
    """Raise CapreseError for names that neither vLLM's LLM nor its engine knows."""
    from vllm.engine.arg_utils import EngineArgs

    known = {*inspect.signature(llm).parameters, *inspect.signature(EngineArgs).parameters} - {"kwargs", *_OURS}
    if unknown := sorted(options.keys() - known):
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise CapreseError(
            "--engine",
            expected="arguments of vllm.LLM, such as dtype or tensor_parallel_size",
            found=", ".join(map(quote, unknown)),
            fix=f"write {near[0]}" if near else "leave it out",
        )


def _check_plugin() -> None:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and environment.PLUGIN not in allowed.split(","):
        raise CapreseError(
            "VLLM_PLUGINS",
            expected=f"a list with {environment.PLUGIN}, or none",
            found=quote(allowed),
            fix=f"unset it, or add {environment.PLUGIN}: vLLM serves dense without it",
        )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
