"""The verbs of `caprese bench`. Only the one that is asked for is imported: each needs packages of its own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import typer

# Verb: module, function.
VERBS = {
    "latency": ("latency", "latency"),
    "decode": ("decode", "decode"),
    "kernels": ("kernel_bench", "kernels"),
    "prefix": ("prefix_bench", "prefix"),
    "accuracy": ("accuracy", "accuracy"),
    "coverage": ("coverage", "coverage"),
    "length": ("length", "length"),
    "exactness": ("exactness", "exactness"),
    "distill-speed": ("distill_speed", "distill_speed"),
    "recovery": ("recovery", "recovery"),
    "ablation": ("ablation", "ablation"),
    "residual": ("residual", "residual"),
    "parameters": ("parameters", "parameters"),
    "all": ("all", "all_benchmarks"),
    "compare": ("compare", "compare"),
    "validate": ("validate", "validate"),
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
