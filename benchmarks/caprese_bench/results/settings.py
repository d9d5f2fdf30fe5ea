"""A verb's settings: one frozen dataclass each, whose fields are its options on the command line.

    @dataclass(frozen=True, kw_only=True)
    class PrefixSettings(ResumableSettings):
        rounds: Annotated[int, typer.Option(min=1, help="Rounds that are measured.")] = 5

    @options_of(PrefixSettings)
    def prefix(settings: PrefixSettings) -> None:
        ...

The verb then is `caprese bench prefix --rounds 5` and, in Python, `prefix(rounds=5)`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from caprese_kernels import terminal

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
# Of benchmarks whose variants a user can add to (configured.py).
ConfigOption = Annotated[
    list[str] | None,
    typer.Option(
        "--config", metavar="NAME=JSON", help="One more variant, served with this --caprese-config; may be repeated."
    ),
]


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Where a benchmark writes its result, and how it prints it."""

    out: Annotated[Path, typer.Option(help="Folder for the result: a JSON file, a CSV file and an HTML page.")] = Path(
        "out/bench"
    )
    as_json: terminal.AsJson = False


@dataclass(frozen=True, kw_only=True)
class ResumableSettings(OutputSettings):
    """Besides, whether an earlier run's rows are kept."""

    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that are already in --out.")] = False


def options_of(settings: type[Settings]) -> Callable[[Callable[[Settings], None]], Callable[..., None]]:
    """Decorates `function(settings)`: the result takes the dataclass's fields as keywords, which typer reads as
    options. What all benchmarks share (--out, --json, --resume) comes last."""

    def decorate(function: Callable[[Settings], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            function(settings(**options))

        types = get_type_hints(settings, include_extras=True)
        shared = [field.name for field in fields(ResumableSettings)]
        ordered = sorted(fields(settings), key=lambda field: field.name in shared)
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=types[each.name]
                )
                for each in ordered
            ]
        )
        run.__annotations__ = {name: types[name] for name in (each.name for each in ordered)}
        return run

    return decorate
