"""The verbs `demo`, `inspect`, `doctor` and `collect-env`. Each imports what it needs when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from caprese_kernels import terminal
from caprese_kernels.terminal import AsJson


def demo(
    math: Annotated[int, typer.Option(min=1, help="Held-out word problems for each variant.")] = 300,
    reading: Annotated[int, typer.Option(min=1, help="Held-out reading questions for each variant.")] = 100,
    variants: Annotated[
        str, typer.Option(help="Comma-separated, of: full, griffin, caprese-griffin, cats, caprese-cats.")
    ] = "full,griffin,caprese-griffin,cats,caprese-cats",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 32,
    output: Annotated[Path, typer.Option(help="JSON file for the results and their provenance.")] = Path(
        "out/demo.json"
    ),
    as_json: AsJson = False,
) -> None:
    """Compare the full model, GRIFFIN, CATS and Caprese through `vllm serve`, on a tiny reasoning model."""
    from .demo.run import run, show

    report = run(math=math, reading=reading, variants=variants.split(","), concurrency=concurrency, output=output)
    if as_json:
        terminal.print_json(report.model_dump(mode="json"))
    else:
        show(report)


def inspect(
    file: Annotated[str, typer.Argument(help="Adapter file, directory with one, or Hub id.")],
    model: Annotated[str | None, typer.Option(help="Directory or Hub id of a model that the adapter must fit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Validate an adapter file as the server does, and show its contents."""
    from . import inspection

    report = inspection.inspect(file, model)
    if as_json:
        terminal.print_json(report)
    else:
        terminal.result().print(inspection.render(report))


def doctor(
    model: Annotated[str, typer.Argument(help="Model directory or Hub id.")],
    caprese_weights: Annotated[
        str | None,
        typer.Option(help="Adapter file, directory with one, or Hub id; default: plain GRIFFIN, all layers."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help='Arguments of vllm.LLM, as {"tensor_parallel_size": 4}.', metavar="JSON")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare every FF block's kernels with plain arithmetic on the real weights and this hardware; for bug reports."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from .doctor import examine, render

    report = examine(model, caprese_weights, engine)
    if as_json:
        terminal.print_json(report)
    else:
        for part in render(report):
            terminal.result().print(part)
    if not report["passed"]:
        raise typer.Exit(1)


def collect_env(as_json: AsJson = False) -> None:
    """Show versions, hardware and whether vLLM finds the plugin; for bug reports."""
    from . import environment

    found = environment.collect()
    if as_json:
        terminal.print_json(found)
    else:
        terminal.result().print(environment.render(found))
