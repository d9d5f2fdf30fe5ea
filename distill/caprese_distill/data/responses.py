"""The responses that `--generate` has so far: token ids by row, in a file from which a killed run continues."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from caprese_kernels import files
from caprese_kernels.errors import CapreseError


@dataclass(frozen=True)
class Response:
    """All sampled ids. The last is the stop token, unless the response was cut at max_tokens."""

    ids: array[int]  # 4 bytes an id; a list takes 36, over a gigabyte for 20,000 long responses
    cut: bool


def responses_path(output: Path) -> Path:
    """The file of responses that stays beside the adapter `output`."""
    return output.with_name(f"{output.stem}.responses.jsonl")


def cache_path(output: Path) -> Path:
    """The responses so far, from which a killed run continues."""
    return output.with_name(f".{output.stem}.responses.jsonl")


def child_files(output: Path) -> tuple[Path, Path]:
    """The files of the child process: its job and its log."""
    return output.with_name(f".{output.stem}.generate.json"), output.with_name(f".{output.stem}.generate.log")


def model_identity(model: str, config: Any) -> str:
    """Identifies a model: the Hub's commit; or, of a directory, a hash of its weight files' sizes and ends."""
    directory = Path(model)
    if not directory.is_dir():
        return f"{model}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.iterdir() if p.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(2**20)
            file.seek(max(0, size - 2**20))
            digest.update(f"{path.name} {size} ".encode() + head + file.read())
    return digest.hexdigest()


def read(cache: Path) -> tuple[dict[str, Any], dict[int, Response], int]:
    """Identity, responses by line, and the number of bytes in whole lines: a kill may leave half of the last one."""
    identity: dict[str, Any] = {}
    responses: dict[int, Response] = {}
    whole = 0
    if not cache.exists():
        return identity, responses, whole
    with cache.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if value is None:
                break
            if whole == 0:
                identity = value
            else:
                responses[value["row"]] = Response(array("i", value["ids"]), value["finish"] != "stop")
            whole += len(line)
    return identity, responses, whole


def resume(cache: Path, identity: Mapping[str, Any], total: int, console: Console | None) -> dict[int, Response]:
    """The responses in the cache, which is left ready for more to be appended.

    CapreseError for those of another run: they may have taken hours, so they are not overwritten.
    """
    found, responses, whole = read(cache)
    if not responses:
        with writing(cache):
            files.write_text(cache, json.dumps(identity) + "\n")
        return {}
    # The date is only a hint for people: where prompts depend on it, they differ.
    other = [key for key in {**identity, **found} if key != "date" and found.get(key) != identity.get(key)]
    if other:
        fix = "give the settings of that run or another --output, or delete the file"
        if found.get("date") and "prompts" in other:  # the template prints it
            fix = f"give --date {found['date']}, on which they were made, or another --output"
        raise CapreseError(
            f"{len(responses)} responses in {cache}",
            expected="those of this run",
            found=f"those of a run with other {', '.join(other)}",
            fix=fix,
        )
    os.truncate(cache, whole)
    if console:
        console.print(f"{cache}: {len(responses)} of {total} responses were made before")
    return responses


def writing(path: Path) -> AbstractContextManager[None]:
    """Raise an OSError of writing `path` as a CapreseError."""
    fix = "free some space, or give another --output"
    return files.reporting(f"responses, {path}", expected="room for them beside the output", fix=fix)
