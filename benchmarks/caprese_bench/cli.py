"""The verbs of `caprese bench`. Only the one that is asked for is imported: each needs packages of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import typer

from caprese_serve import cli

# Verb: module, function.
VERBS = {
    "latency": ("engine.latency", "latency"),
    "decode": ("engine.decode", "decode"),
    "kernels": ("kernels.bench", "kernels"),
    "prefix": ("engine.prefix", "prefix"),
    "accuracy": ("evaluation.accuracy", "accuracy"),
    "coverage": ("evaluation.coverage", "coverage"),
    "length": ("evaluation.length", "length"),
    "exactness": ("engine.exactness", "exactness"),
    "distill-speed": ("recovery.distill_speed", "distill_speed"),
    "recovery": ("recovery.recovery", "recovery"),
    "ablation": ("recovery.ablation", "ablation"),
    "residual": ("recovery.residual", "residual"),
    "parameters": ("recovery.parameters", "parameters"),
    "all": ("all", "all_benchmarks"),
    "compare": ("results.compare", "compare"),
    "validate": ("results.validate", "validate"),
}


def app(arguments: Sequence[str]) -> typer.Typer:
    """The command, with the verb that the arguments name; with all of them, for their help, where they name none."""
    made = typer.Typer(
        help="Measure this checkout.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    made.callback()(lambda: None)  # else a single verb would be the command itself
    for verb in [word for word in arguments[:1] if word in VERBS] or VERBS:
        module, function = VERBS[verb]
        made.command(verb)(getattr(import_module(f".{module}", __package__), function))
    return made


def main(verb: str) -> None:
    """`caprese bench VERB` with the arguments of this process."""
    sys.argv = ["caprese", "bench", verb, *sys.argv[1:]]
    cli.main()
