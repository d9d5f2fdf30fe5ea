"""Measure speed, accuracy and exactness: `caprese bench VERB`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import typer

from caprese_kernels import terminal
from caprese_serve.verbs import LazyGroup, Verb

VERBS = {
    name: Verb(f"{__package__}.{module}", function, "caprese-vllm", "bench")
    for name, module, function in (
        ("latency", "engine.latency", "latency"),
        ("decode", "engine.decode", "decode"),
        ("kernels", "kernels.bench", "kernels"),
        ("prefix", "engine.prefix", "prefix"),
        ("accuracy", "evaluation.accuracy", "accuracy"),
        ("coverage", "evaluation.coverage", "coverage"),
        ("length", "evaluation.length", "length"),
        ("exactness", "engine.exactness", "exactness"),
        ("distill-speed", "recovery.distill_speed", "distill_speed"),
        ("recovery", "recovery.recovery", "recovery"),
        ("ablation", "recovery.ablation", "ablation"),
        ("residual", "recovery.residual", "residual"),
        ("selection", "recovery.selection", "selection"),
        ("parameters", "recovery.parameters", "parameters"),
        ("all", "all", "all_benchmarks"),
        ("compare", "results.compare", "compare"),
        ("validate", "results.validate", "validate"),
    )
}


class Benchmarks(LazyGroup):
    """The verbs of `caprese bench`."""

    def verbs(self) -> Mapping[str, Verb]:
        """`VERBS`, in its order."""
        return VERBS


app = typer.Typer(
    cls=Benchmarks,
    help="Measure speed, accuracy and exactness; results are a table, JSON, CSV and one HTML page.",
    epilog=terminal.EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
)
app.callback()(lambda: None)  # without a callback, typer wants a command registered here


def main(*words: str) -> None:
    """`caprese bench WORDS...` with the arguments of this process. Works in a checkout that is not installed, too."""
    arguments = [*words, *sys.argv[1:]]
    sys.argv = ["caprese", "bench", *arguments]  # the command in a result's provenance
    terminal.run(app, "caprese bench", arguments)
