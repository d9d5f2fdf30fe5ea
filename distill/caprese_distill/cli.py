"""The command `caprese distill`: its options are the fields of `DistillConfig`, its result is an adapter file."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from caprese_kernels import terminal
from caprese_kernels.errors import CapreseError

from .config import OPTIONS, DistillConfig, Group, Option, choices, flag, negative_flag
from .settings_file import load_config


def distill(context: typer.Context, config: Path | None, dry_run: bool, as_json: bool, **_: Any) -> None:
    """Make adapters that recover what a sparse FF block loses.

    An interrupted run continues where it stopped when the same command is given again.
    """
    given = _given(context)
    missing = [field for field in ("model", "data") if field not in given]
    if missing and config is None:
        raise typer.BadParameter(f"{' and '.join(missing)} missing: give MODEL and --data, or --config")
    settings = load_config(given, config)
    if dry_run and settings.generate:
        raise CapreseError(
            "--dry-run",
            expected="data with responses, to count their tokens",
            found="--generate",
            fix="leave one of the options out; an interrupted --generate keeps its responses",
        )
    # These import torch and transformers, which takes seconds: neither --help nor a wrong option should wait for it.
    from .job import Job
    from .report import render_estimate, render_plan, render_result

    notes = terminal.notes()
    job = Job(settings, notes)
    plan = job.plan()
    shown = terminal.result() if dry_run and not as_json else notes
    for part in render_plan(plan):
        shown.print(part, markup=False)
    estimate = job.estimate()
    if estimate or dry_run:
        shown.print(render_estimate(estimate))
    if dry_run:
        if as_json:
            terminal.print_json(plan.record() | {"seconds": estimate.seconds if estimate else None})
        return
    result = job.run()
    if as_json:
        terminal.print_json(result.record())
        return
    for part in render_result(result):
        terminal.result().print(part, markup=False)


def _given(context: typer.Context) -> dict[str, Any]:
    """The fields whose options are on the command line, with their values."""

    def present(parameter: str) -> bool:
        source = context.get_parameter_source(parameter)
        return source is not None and source.name == "COMMANDLINE"

    given = {name: context.params[name] for name in OPTIONS if present(name)}
    return given | {name: False for name in OPTIONS if present(f"no_{name}")}


def _parameters() -> list[inspect.Parameter]:
    """The command's parameters: those of the fields, and those of this command alone."""
    settings = typer.Option(
        help="YAML file of options, as `rank: 256` (max_length for --max-length). Options given beside it override it."
    )
    trial = typer.Option(
        "--dry-run",
        help="Print the plan, the memory and the time estimated from a few batches; write nothing.",
        rich_help_panel=Group.OUTPUT,
    )
    parameters = [_parameter("context", typer.Context, inspect.Parameter.empty)]
    for name, option in OPTIONS.items():
        parameters += _field_parameters(name, option)
    parameters.append(_parameter("config", Annotated[Path | None, settings], None))
    parameters.append(_parameter("dry_run", Annotated[bool, trial], False))
    parameters.append(_parameter("as_json", terminal.AsJson, False))
    return parameters


def _field_parameters(name: str, option: Option) -> list[inspect.Parameter]:
    field = DistillConfig.model_fields[name]
    kind = _value_type(field.annotation)
    if name == "model":
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
        metavar=option.metavar or "|".join(choices(name)),
        help=option.help,
        rich_help_panel=option.group,
    )
    default = None if field.is_required() else field.default
    return [_parameter(name, Annotated[kind | None, shown], default)]


def _value_type(annotation: Any) -> type:
    """The type that typer parses for a field; `DistillConfig` parses the text of any other."""
    if get_origin(annotation) is Annotated:
        return _value_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        members = [part for part in get_args(annotation) if part is not NoneType]
        return _value_type(members[0]) if len(members) == 1 else str
    return annotation if annotation in (int, float, bool, Path) else str


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


# typer reads both.
distill.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
distill.__annotations__ = {each.name: each.annotation for each in _parameters()}
