"""What a benchmark's JSON file holds, whichever the benchmark."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class StoredResult(BaseModel):
    """What any benchmark's file has; `schemas` describes the rows of each."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(max_length=200)]
    provenance: dict[str, Any]
    keys: list[str]
    measures: list[str]
    rows: list[dict[str, str | bool | int | float | None]] = Field(max_length=1_000_000)
    errors: list[str] = []
    partial: bool = True
