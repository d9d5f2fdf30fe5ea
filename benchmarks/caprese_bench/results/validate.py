"""`caprese bench validate`: check result files against their schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caprese_kernels import terminal
from caprese_kernels.errors import CapreseError, printable


def validate(
    files: Annotated[list[Path] | None, typer.Argument(help="Result files, for example latency.json.")] = None,
    schema: Annotated[str | None, typer.Option(help="Print the JSON Schema of this benchmark's file instead.")] = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Check result files against their schema; the first mistake ends with exit code 1."""
    from .schemas import check, json_schema

    if schema is not None:
        terminal.print_json(json_schema(schema))
        return
    if not files:
        raise CapreseError("validate", expected="result files, or --schema NAME", found="neither", fix="give one")
    checked = []
    for file in files:
        checked.append({"file": str(file), "rows": check(file)})
        if not as_json:
            print(printable(f"{file}: {checked[-1]['rows']} rows, valid"))
    if as_json:
        terminal.print_json(checked)
