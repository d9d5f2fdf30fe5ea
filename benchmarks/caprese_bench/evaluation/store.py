"""Responses on disk: one JSON line each, written when it arrives, known by all that it depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from caprese_kernels.errors import CapreseError


class Response(BaseModel):
    """One line: the samples of one request, and the server's counters that show how they were generated."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: str = Field(description="of the problem")
    identity: dict[str, Any] = Field(description="model, adapter, configuration, prompt's SHA-256, sampling, seed")
    texts: list[str]
    finish: list[str] = Field(description="why each sample ended: stop, or length")
    tokens: int = Field(ge=0, description="generated, of all samples")
    session: str = Field(description="responses asked for by one client, one after another or at once")
    sparse_tokens: int = Field(ge=0, description="that sparse FF blocks ran since the session began, by GET /caprese")
    ff_weights_read: float | None = Field(description="share of all FF weights that these tokens needed")

    @property
    def key(self) -> str:
        return digest(self.identity)


def digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Store:
    """The responses of one file. A kill may leave half a line at its end, which is left out."""

    def __init__(self, path: Path, keep: bool):
        """With `keep` the file is gone on with; else it is moved aside, as NAME.jsonl.old."""
        self.path, self.found = path, dict[str, Response]()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not keep and path.exists():
            path.replace(path.with_suffix(".jsonl.old"))
        text = path.read_text() if path.exists() else ""
        *lines, half = text.split("\n")
        if half:
            path.write_text("".join(f"{line}\n" for line in lines))
        for number, line in enumerate(lines, start=1):
            try:
                response = Response.model_validate_json(line)
            except ValidationError as error:
                told = error.errors()[0]["msg"]
                raise CapreseError(
                    f"{path}, line {number}", expected="a stored response", found=told, fix="remove the line"
                ) from None
            self.found[response.key] = response

    def discard(self, session: str) -> None:
        """Forget a session's responses."""
        self.found = {key: response for key, response in self.found.items() if response.session != session}
        new = self.path.with_suffix(".jsonl.new")
        new.write_text("".join(f"{response.model_dump_json()}\n" for response in self.found.values()))
        new.replace(self.path)

    def add(self, response: Response) -> None:
        with self.path.open("a") as file:
            file.write(response.model_dump_json() + "\n")
        self.found[response.key] = response
