"""Responses on disk: a JSON line each, written when it arrives, under a key of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from caprese_kernels import files
from caprese_kernels.errors import CapreseError

MAX_STORE = 1 << 30  # bytes


class Response(BaseModel):
    """One line: the samples of one request, and the server's counters, which prove how they were generated."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: str = Field(description="the problem's name")
    identity: dict[str, Any] = Field(description="model, adapter, configuration, SHA-256 of the prompt, sampling, seed")
    texts: list[str]
    finish: list[str] = Field(description="why each sample ended: stop or length")
    tokens: int = Field(ge=0, description="generated tokens of all samples")
    session: str = Field(description="names the client session that requested it")
    sparse_tokens: int = Field(
        ge=0, description="tokens that sparse FF blocks computed since the session began, by GET /caprese"
    )
    ff_weights_read: float | None = Field(description="share of all FF weights that these tokens needed")

    @property
    def key(self) -> str:
        """Digest of the identity."""
        return digest(self.identity)


def digest(identity: dict[str, Any]) -> str:
    """SHA-256 of the identity, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Store:
    """The responses of one file. A killed run may leave half a line at its end, which is removed."""

    def __init__(self, path: Path, keep: bool):
        """With `keep` the store continues the file; otherwise an existing file is renamed to NAME.jsonl.old."""
        self.path, self.found = path, dict[str, Response]()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not keep and path.exists():
            path.replace(path.with_suffix(".jsonl.old"))
        with files.reporting(str(path), expected="stored responses", fix="give another --out"):
            text = files.read_text(path, MAX_STORE) if os.path.lexists(path) else ""
            *lines, incomplete = text.split("\n")
            if incomplete:
                files.write_text(path, "".join(f"{line}\n" for line in lines))
        for number, line in enumerate(lines, start=1):
            try:
                response = Response.model_validate_json(line)
            except ValidationError as error:
                reason = error.errors(include_url=False)[0]["msg"]
                raise CapreseError(
                    f"{path}, line {number}", expected="a stored response", found=reason, fix="remove the line"
                ) from None
            self.found[response.key] = response

    def discard(self, session: str) -> None:
        """Remove a session's responses, from the file too."""
        self.found = {key: response for key, response in self.found.items() if response.session != session}
        files.write_text(self.path, "".join(f"{response.model_dump_json()}\n" for response in self.found.values()))

    def add(self, response: Response) -> None:
        """Append the response to the file."""
        fix = "free some space, and run the same command again: it continues"
        with (
            files.reporting(str(self.path), expected="room for a response", fix=fix),
            self.path.open("a", encoding="utf-8") as file,
        ):
            file.write(response.model_dump_json() + "\n")
        self.found[response.key] = response
