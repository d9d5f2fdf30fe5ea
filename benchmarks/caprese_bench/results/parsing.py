"""Validating what a file holds: the first mistake becomes a CapreseError."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from caprese_kernels import files
from caprese_kernels.errors import CapreseError, quote
from caprese_kernels.json_text import parse_json

Schema = TypeVar("Schema", bound=BaseModel)
MAX_RESULT = 1 << 24  # bytes


def read_json(path: Path) -> Any:
    """The value in a result file. Raises CapreseError for one that cannot be read or is no JSON."""
    try:
        return parse_json(files.read_bytes(path, MAX_RESULT), MAX_RESULT)
    except (OSError, ValueError) as error:
        raise CapreseError(
            f"result {path}",
            expected="a JSON file that a benchmark wrote",
            found=files.reason(error) if isinstance(error, OSError) else str(error),
            fix="correct the path",
        ) from None


def parse(schema: type[Schema], value: Any, where: str, fix: str = "measure again") -> Schema:
    """`schema.model_validate(value)`. Raises CapreseError with the key of the first mistake, prefixed by `where`."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        rule = "no such key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise CapreseError(
            ": ".join((where, ".".join(map(str, first["loc"])))).removesuffix(": "),
            expected=rule[0].lower() + rule[1:],
            found="nothing" if first["type"] == "missing" else quote(first["input"]),
            fix=fix,
        ) from None
