"""Validating what a file holds: the first mistake becomes a CapreseError."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from caprese_kernels.errors import CapreseError

Schema = TypeVar("Schema", bound=BaseModel)


def parse(schema: type[Schema], value: Any, where: str, fix: str = "measure again") -> Schema:
    """`schema.model_validate(value)`. Raises CapreseError with the key of the first mistake, prefixed by `where`."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        rule = "no such key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise CapreseError(
            ": ".join((where, ".".join(map(str, first["loc"])))).removesuffix(": "),
            expected=rule[0].lower() + rule[1:],
            found="nothing" if first["type"] == "missing" else repr(first["input"]),
            fix=fix,
        ) from None
