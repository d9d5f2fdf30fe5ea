"""The verbs of `caprese bench`."""

from __future__ import annotations

import typer

from .ablation import ablation
from .accuracy import accuracy
from .all import all_benchmarks
from .compare import compare
from .coverage import coverage
from .distill_speed import distill_speed
from .exactness import exactness
from .kernel_bench import kernels
from .latency import latency
from .length import length
from .parameters import parameters
from .prefix_bench import prefix
from .recovery import recovery
from .residual import residual
from .validate import validate

app = typer.Typer(
    help="Measure this checkout.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
for verb in (
    latency,
    exactness,
    kernels,
    prefix,
    distill_speed,
    parameters,
    residual,
    ablation,
    recovery,
    accuracy,
    coverage,
    length,
    compare,
    validate,
):
    app.command()(verb)
app.command("all")(all_benchmarks)
