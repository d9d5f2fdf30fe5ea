"""What the settings of all verbs on adapters have in common: options, their flags, and their errors.

A class of settings has every option of its verb once: its type, range, default, help text and group. `command_line.py`
makes the flags from it, `settings_file.py` reads it from YAML. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from caprese_kernels.errors import CapreseError, quote
from caprese_kernels.json_text import parse_json as parse_bounded

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


class Group(StrEnum):
    """The groups of options in the help."""

    MODEL = "Model"
    DATA = "Data"
    METHOD = "Method"
    TRAINING = "Training"
    MACHINES = "Machines"
    OUTPUT = "Output"


@dataclass(frozen=True)
class Option:
    """What a field needs for the command line besides its type and range."""

    group: Group
    help: str
    metavar: str | None = None
    recorded: bool = True  # whether the recorded command has it; False if it does not change the adapter
    positional: bool = False  # an argument without a flag


def not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


def parse_layers(value: Any) -> Any:
    """ "0,1,2" as a list; ValueError for anything else than that, a list of indices, "first-half", "all" and None."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(,\d{1,9})*", value):
        return [int(index) for index in value.split(",")]
    indices = isinstance(value, list) and all(type(index) is int and index >= 0 for index in value)
    if value in (None, "first-half", "all") or indices:
        return value
    raise ValueError("first-half, all, or indices as 0,1,2")


def parse_json(value: Any) -> Any:
    """The object of a JSON text, or of a mapping of JSON values; ValueError for anything else but None."""
    if value is None:
        return None
    try:
        found = parse_bounded(value if isinstance(value, str) else json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a JSON object ({error})") from None
    if not isinstance(found, dict):
        raise ValueError("a JSON object")
    return found


# Written as text or numbers: YAML reads 2e-4 as text, and true as 1.
Integer = Annotated[int, BeforeValidator(not_bool)]
Number = Annotated[float, BeforeValidator(not_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0.0)]


class Settings(BaseModel):
    """The base of a verb's settings. A wrong value, and an unknown name, raise CapreseError."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    if not TYPE_CHECKING:  # type checkers take the parameters from the fields

        def __init__(self, **values: Any) -> None:
            for name, value in values.items():
                if not _is_text(name) or (isinstance(value, str | Path) and not _is_text(str(value))):
                    raise CapreseError(
                        name, expected="UTF-8 text without NUL", found=quote(str(value)), fix="correct it"
                    )
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _first_error(error, type(self)) from None

    @classmethod
    def options(cls) -> dict[str, Option]:
        """What the command line shows of each field, by the fields' names."""
        return _options(cls)

    def words(self, unused: frozenset[str] = frozenset()) -> list[str]:
        """The options of a command with these settings, defaults included, without arguments and what is `unused`."""
        words, switches = [], []
        for name, option in self.options().items():
            value = getattr(self, name)
            if option.positional or name in unused or value is None or not option.recorded:
                continue
            if isinstance(value, bool):
                if value != type(self).model_fields[name].default:
                    switches.append(flag(name) if value else negative_flag(name))
            else:
                words += [flag(name), _as_text(value)]
        return words + switches


@cache
def _options(settings: type[Settings]) -> dict[str, Option]:
    """In the order of the groups, as the help shows them."""
    found = {
        name: next(each for each in field.metadata if isinstance(each, Option))
        for name, field in settings.model_fields.items()
    }
    groups = list(Group)
    return dict(sorted(found.items(), key=lambda item: groups.index(item[1].group)))


def flag(name: str) -> str:
    """The flag of a field: "max_length" -> "--max-length"."""
    return f"--{name.replace('_', '-')}"


def label(name: str, option: Option) -> str:
    """How the command line names a field: its flag, or the argument's name."""
    return option.metavar or name.upper() if option.positional else flag(name)


def negative_flag(name: str) -> str:
    """The flag that turns a switch off: "generate" -> "--no-generate"."""
    return flag(f"no_{name}")


def choices(settings: type[Settings], name: str) -> tuple[str, ...]:
    """The values of a field that has a fixed set of them; else none."""
    annotation = settings.model_fields[name].annotation
    parts = [part for part in (annotation, *get_args(annotation)) if getattr(part, "__origin__", None) is Literal]
    return tuple(get_args(parts[0])) if parts else ()


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _is_text(value: str) -> bool:
    """Whether it can be the name of a file and stand in one: the adapter file records the command."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _first_error(error: ValidationError, settings: type[Settings]) -> CapreseError:
    """The first error as a CapreseError; `what` is the field's name."""
    errors = error.errors(include_url=False)
    first = errors[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, CapreseError):
        return cause
    if not first["loc"]:  # a key or value that pydantic cannot read at all
        return CapreseError("settings", expected="options by name", found=quote(first["input"]), fix="correct them")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return CapreseError(
            name, expected=f"one of {', '.join(settings.options())}", found="another name", fix="correct it"
        )
    if first["type"] == "missing":
        return CapreseError(
            name, expected=f"a value: {settings.options()[name].help.rstrip('.')}", found="none", fix="give one"
        )
    # A union has an error for each of its members.
    expected = dict.fromkeys(_expected(each) for each in errors if each["loc"][0] == first["loc"][0])
    return CapreseError(name, expected=" or ".join(expected), found=quote(first["input"]), fix="correct it")


def _expected(error: ErrorDetails) -> str:
    if error["type"] == "path_type":
        return "a path"
    message = re.sub(r", (unable to|got) .*", "", error["msg"])
    for start in ("Input should be ", "Value error, "):
        message = message.removeprefix(start)
    return message[0].lower() + message[1:]
