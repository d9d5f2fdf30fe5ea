"""`caprese bench validate`: result files held to their format (schemas.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from caprese_kernels.errors import CapreseError


def validate(
    files: Annotated[list[Path], typer.Argument(help="Result files, as latency.json.")] = [],  # noqa: B006
    schema: Annotated[str | None, typer.Option(help="Print the JSON Schema of this benchmark's file instead.")] = None,
) -> None:
    """Check result files against their schema; exit code 1 and the first mistake where one does not hold."""
    from .schemas import check, json_schema

    if schema is not None:
        print(json.dumps(json_schema(schema), indent=2))
    elif not files:
        raise CapreseError("validate", expected="result files, or --schema NAME", found="neither", fix="give one")
    for file in files:
        print(f"{file}: {check(file)} rows, valid")
