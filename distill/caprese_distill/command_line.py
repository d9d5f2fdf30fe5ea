"""Flags from a class of settings, for the verbs that make or measure adapter files."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from caprese_kernels import terminal

from .options import Group, Option, Settings, choices, flag, label, negative_flag


def given_options(context: typer.Context, settings: type[Settings]) -> dict[str, Any]:
    """The fields whose options are on the command line, with their values."""

    def present(parameter: str) -> bool:
        source = context.get_parameter_source(parameter)
        return source is not None and source.name == "COMMANDLINE"

    options = settings.options()
    given = {name: context.params[name] for name in options if present(name)}
    required = {
        name: label(name, option) for name, option in options.items() if settings.model_fields[name].is_required()
    }
    missing = [shown for name, shown in required.items() if name not in given]
    if missing and context.params["config"] is None:
        needed = " and ".join(required.values())
        raise typer.BadParameter(f"{' and '.join(missing)} missing: give {needed}, or --config")
    return given | {name: False for name in options if present(f"no_{name}")}


def prefer_huge_pages() -> None:
    """Let torch ask Linux for huge pages (2 MiB in place of 4 KiB) in this process. Call it before torch is imported.

    Logits of a few thousand tokens take a gibibyte, which is mapped anew at each step, a fault for each of its pages.
    A user's own THP_MEM_ALLOC_ENABLE is left as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def take_options(function: Callable[..., None], settings: type[Settings], dry_run: bool = True) -> None:
    """Give the verb `function` the options of the fields, --config, --json and perhaps --dry-run; typer reads both."""
    parameters = _parameters(settings, dry_run)
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in parameters}


def _parameters(settings: type[Settings], dry_run: bool) -> list[inspect.Parameter]:
    file = typer.Option(
        help="YAML file of options, as `rank: 256` (max_length for --max-length). Options given beside it override it."
    )
    trial = typer.Option(
        "--dry-run",
        help="Print the plan, the memory and the time estimated from a few batches; write nothing.",
        rich_help_panel=Group.OUTPUT,
    )
    parameters = [_parameter("context", typer.Context, inspect.Parameter.empty)]
    for name, option in settings.options().items():
        parameters += _field_parameters(settings, name, option)
    parameters.append(_parameter("config", Annotated[Path | None, file], None))
    if dry_run:
        parameters.append(_parameter("dry_run", Annotated[bool, trial], False))
    parameters.append(_parameter("as_json", terminal.AsJson, False))
    return parameters


def _field_parameters(settings: type[Settings], name: str, option: Option) -> list[inspect.Parameter]:
    field = settings.model_fields[name]
    kind = _value_type(field.annotation)
    if option.positional:
        argument = typer.Argument(metavar=option.metavar, help=option.help, show_default=False)
        return [_parameter(name, Annotated[str | None, argument], None)]
    if kind is bool:  # two switches, so that either overrides a file
        on = typer.Option(flag(name), help=option.help, rich_help_panel=option.group, show_default=False)
        off = typer.Option(
            negative_flag(name),
            help=f"Turns {flag(name)} off.",
            rich_help_panel=option.group,
            show_default=False,
            hidden=not field.default,
        )
        switch = Annotated[bool, on]
        return [_parameter(name, switch, False), _parameter(f"no_{name}", Annotated[bool, off], False)]
    shown = typer.Option(
        flag(name),
        metavar=option.metavar or "|".join(choices(settings, name)),
        help=option.help,
        rich_help_panel=option.group,
    )
    default = None if field.is_required() else field.default
    return [_parameter(name, Annotated[kind | None, shown], default)]


def _value_type(annotation: Any) -> type:
    """The type that typer parses for a field; the settings parse the text of any other."""
    if get_origin(annotation) is Annotated:
        return _value_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        members = [part for part in get_args(annotation) if part is not NoneType]
        return _value_type(members[0]) if len(members) == 1 else str
    return annotation if annotation in (int, float, bool, Path) else str


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
