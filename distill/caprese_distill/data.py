"""From JSONL rows to token ids, cut as in serving: prompt tokens first, generated tokens after.

A row is `{"prompt": str | [{"role": str, "content": str}, ...], "response": str}`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from caprese_kernels.errors import CapreseError


@dataclass(frozen=True)
class Row:
    """One line of the data file."""

    line: int  # counted from 1
    prompt: str | list[dict[str, Any]]
    response: str


@dataclass(frozen=True, eq=False)
class Sample:
    """The tokens of one row that a server would feed to the model; `line` names the row in errors."""

    ids: Tensor  # [T] int32; the last token sampled is never fed, so it is not here
    prompt_length: int
    line: int

    @property
    def num_rows(self) -> int:
        """Generated tokens that are fed: those of index >= prompt length."""
        return len(self.ids) - self.prompt_length


def read_rows(path: Path, limit: int | None = None, seed: int = 0) -> list[Row]:
    """Every row of the file, or `limit` of them drawn by `seed`, in the file's order.

    Raises CapreseError for a file that cannot be read or has no rows, and for the first bad line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        _refuse(str(path), "a readable file", error.strerror or type(error).__name__, "correct the path")
    except UnicodeDecodeError as error:
        _refuse(str(path), "text in UTF-8", f"byte {error.start} is not", "convert the file")
    # Only "\n" ends a JSONL line: splitlines() would also cut at the U+2028 that JSON strings may hold.
    rows = [_parse(path, n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not rows:
        _refuse(str(path), "a JSON object a line", "an empty file", "write at least two rows")
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def _parse(path: Path, number: int, line: str) -> Row:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        _refuse(where, "a JSON object", f"{error.msg} at character {error.pos}", "correct the line")
    if not isinstance(value, dict):
        _refuse(where, "a JSON object", type(value).__name__, "correct the line")
    missing = [key for key in ("prompt", "response") if key not in value]
    if missing:
        _refuse(where, "keys 'prompt' and 'response'", f"no {missing[0]!r}", "add it")
    prompt, response = value["prompt"], value["response"]
    if not isinstance(response, str):
        _refuse(where, "a string in 'response'", type(response).__name__, "correct the line")
    is_chat = isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)
    if not (isinstance(prompt, str) or is_chat):
        _refuse(where, "a string or a list of chat messages in 'prompt'", f"{prompt!r:.60}", "correct the line")
    return Row(number, prompt, response)


def encode(
    tokenizer: Any, rows: Sequence[Row], max_length: int, advance: Callable[[], object] = lambda: None
) -> tuple[list[Sample], Counter[str]]:
    """Token ids of the rows, and how many were skipped by reason. `advance` is called after each row.

    The prompt is rendered by the tokenizer's chat template with the generation prompt; without a
    template it is the plain text. The response is encoded on its own, because a model that
    generates it never merges its first characters with the prompt's last, and special tokens
    written in it become their ids, as when generated. The eos token that ended it was sampled but
    never fed; without one (the tokenizer has none) that holds for the response's last token.
    """
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    for row in rows:
        prompt = _prompt_ids(tokenizer, row)
        response = tokenizer.encode(row.response, add_special_tokens=False)
        if tokenizer.eos_token_id is not None and response[-1:] != [tokenizer.eos_token_id]:
            response = [*response, tokenizer.eos_token_id]
        if len(prompt) + len(response) > max_length:
            skipped[f"longer than {max_length} tokens"] += 1
        elif not prompt:
            skipped["empty prompt"] += 1
        elif len(response) < 2:
            skipped["empty response"] += 1
        else:
            ids = torch.tensor([*prompt, *response[:-1]], dtype=torch.int32)
            samples.append(Sample(ids, len(prompt), row.line))
        advance()
    return samples, skipped


def _prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    if tokenizer.chat_template is None:
        if not isinstance(row.prompt, str):
            _refuse(
                f"data, line {row.line}",
                "a string in 'prompt', since the model has no chat template",
                "chat messages",
                "write the prompts as text, or give the tokenizer a chat template",
            )
        return list(tokenizer.encode(row.prompt))
    messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # templates raise what they like: TemplateError, TypeError, KeyError ...
        reason = f"{type(error).__name__}: {error}"
        _refuse(f"data, line {row.line}", "messages that the chat template renders", reason, "correct the line")


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples to fit and samples held out: a tenth, at least one, drawn the same way every time.

    Drawn, not every tenth: data whose kinds of problems take turns would hold out one kind only.
    """
    held = set(random.Random(0).sample(range(len(samples)), max(1, len(samples) // 10)))
    return [s for i, s in enumerate(samples) if i not in held], [samples[i] for i in sorted(held)]


def _refuse(where: str, expected: str, found: str, fix: str) -> NoReturn:
    raise CapreseError(where, expected=expected, found=found, fix=fix)
