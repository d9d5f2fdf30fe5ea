"""Validation by a pydantic schema, with errors that a user can act on."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .errors import CapreseError, quote

Schema = TypeVar("Schema", bound=BaseModel)


def validate(schema: type[Schema], value: Any, where: str) -> Schema:
    """`schema.model_validate`; raises the first validation error as a CapreseError."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        if not errors[0]["loc"]:
            raise CapreseError(where, expected="a JSON object", found=quote(value), fix="correct it") from None

        # A part of a location may name a branch of a union, which means nothing to a user.
        def key_of(e: Any) -> str:
            return ".".join(str(part) for part in e["loc"] if part in known or isinstance(part, int))

        known = _keys(schema)
        # A union reports an error for each branch; those of the branch that got furthest are the useful ones.
        errors = [e for e in errors if e["loc"][0] == errors[0]["loc"][0]]
        errors = [e for e in errors if len(e["loc"]) == max(len(other["loc"]) for other in errors)]
        first = errors[0]
        expected = [e["msg"][0].lower() + e["msg"][1:] for e in errors if key_of(e) == key_of(first)]
        if first["type"] == "extra_forbidden":
            expected = ["one of " + ", ".join(schema.model_fields)]
        raise CapreseError(
            f"{where}: key {key_of(first) or '.'.join(map(str, first['loc']))!r}",
            expected=" or ".join(expected),
            found=quote(first["input"]) if first["type"] != "missing" else "nothing",
            fix="correct it",
        ) from None


def _keys(schema: type[BaseModel]) -> set[str]:
    keys = set(schema.model_fields)
    for field in schema.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= _keys(field.annotation)
    return keys
