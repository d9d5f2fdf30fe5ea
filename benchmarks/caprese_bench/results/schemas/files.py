"""The format of a whole result file, and checking one against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from caprese_kernels.errors import CapreseError

from ..parsing import parse, read_json
from .analysis import Ablation, Parameters, Recovery, Residual, Selection
from .answers import Accuracy, Coverage, Exactness, Length
from .fields import Amount, Row
from .speed import Decode, DistillSpeed, Kernels, Latency, Prefix


class GpuCheck(Row):
    """A step of `make gpu-check`."""

    step: str
    stage: Literal["a", "b"]
    status: Literal["passed", "failed", "out of time", "no tests", "skipped"]
    seconds: Amount
    given_seconds: float | None = None
    returncode: int | None = None
    command: str | None = None
    output: str | None = Field(None, description="its last lines")


# By the benchmark's name, which is also the file's.
ROWS: dict[str, type[Row]] = {
    "kernels": Kernels,
    "latency": Latency,
    "decode": Decode,
    "exactness": Exactness,
    "prefix": Prefix,
    "parameters": Parameters,
    "residual": Residual,
    "selection": Selection,
    "ablation": Ablation,
    "recovery": Recovery,
    "accuracy": Accuracy,
    "coverage": Coverage,
    "length": Length,
    "distill-speed": DistillSpeed,
    "check": GpuCheck,
}


class Provenance(BaseModel):
    """Where the figures come from. A benchmark may add keys of its own."""

    model_config = ConfigDict(extra="allow", strict=True)
    command: str
    git_commit: str | None
    time: str = Field(description="ISO 8601, UTC")
    hardware: dict[str, Any]
    versions: dict[str, str | None]
    settings: dict[str, Any] = Field(default_factory=dict, description="settings that hold for all rows")
    note: str | None = Field(None, description="a remark by whoever measured, written by hand")


AnyRow = TypeVar("AnyRow", bound=Row)


class ResultFile(BaseModel, Generic[AnyRow]):
    """NAME.json."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    provenance: Provenance
    keys: list[str] = Field(description="columns that name a case")
    measures: list[str] = Field(description="columns that `caprese bench compare` sets side by side")
    rows: list[AnyRow]
    errors: list[str] = Field(description="cases that failed, which have no row")
    partial: bool = Field(description="the run was stopped before its end")


def file_model(name: str) -> type[ResultFile[Any]]:
    """The pydantic model of NAME.json. Raises CapreseError for an unknown benchmark."""
    if name not in ROWS:
        raise CapreseError("benchmark", expected=f"one of {', '.join(ROWS)}", found=repr(name), fix="correct the name")
    return ResultFile[ROWS[name]]  # type: ignore[valid-type]


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of NAME.json. Raises CapreseError for an unknown benchmark."""
    return file_model(name).model_json_schema()


def check(path: Path) -> int:
    """Check a result file, or one of `caprese demo`, against its schema; returns its number of rows.

    Raises CapreseError naming the first key that breaks the schema, a column that does not exist, or two rows for one
    case.
    """
    found = read_json(path)
    if isinstance(found, dict) and "name" not in found:
        from caprese_serve.demo.results import DemoReport

        return len(parse(DemoReport, found, str(path)).rows)
    name = found["name"] if isinstance(found, dict) else ""
    result = parse(file_model(name if isinstance(name, str) else ""), found, str(path))
    columns = set(ROWS[result.name].model_fields)
    if unknown := [column for column in (*result.keys, *result.measures) if column not in columns]:
        raise CapreseError(
            str(path), expected="keys and measures among the columns", found=unknown[0], fix="measure again"
        )
    cases = [tuple(getattr(row, key) for key in result.keys) for row in result.rows]
    if len(set(cases)) < len(cases):
        repeated = next(case for case in cases if cases.count(case) > 1)
        raise CapreseError(
            str(path), expected="one row for each case", found=f"two for {repeated}", fix="measure again"
        )
    return len(cases)
