"""From rows to token ids, cut as in serving: prompt tokens first, generated tokens after."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caprese_kernels.errors import CapreseError


@dataclass(frozen=True)
class Row:
    """One row of the data."""

    line: int  # of the file, or row of the dataset; counted from 1
    prompt: str | list[dict[str, Any]]  # text, or chat messages with `role` and `content`
    response: str  # empty where it is yet to be generated


@dataclass(frozen=True, eq=False)
class Sample:
    """The tokens of one row that a server would feed to the model; `line` names the row in errors."""

    ids: Tensor  # [T] int32; the last token sampled is never fed, so it is not here
    prompt_length: int
    line: int

    @classmethod
    def of(cls, prompt: Sequence[int], response: Sequence[int], line: int) -> Sample:
        """From the token ids of a prompt and of all that was sampled after it; the last one was never fed."""
        return cls(torch.tensor([*prompt, *response[:-1]], dtype=torch.int32), len(prompt), line)

    @property
    def num_rows(self) -> int:
        """Generated tokens that are fed: those of index >= prompt length."""
        return len(self.ids) - self.prompt_length


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
        prompt = prompt_ids(tokenizer, row)
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
            samples.append(Sample.of(prompt, response, row.line))
        advance()
    return samples, skipped


def prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    """The prompt as a server would feed it; none for a prompt without text."""
    texts = [row.prompt] if isinstance(row.prompt, str) else [message.get("content") for message in row.prompt]
    if not any(str(text or "").strip() for text in texts):
        return []
    where = f"data, line {row.line}"
    if tokenizer.chat_template is None:
        if not isinstance(row.prompt, str):
            raise CapreseError(
                where,
                expected="a prompt that is text, since the model has no chat template",
                found="chat messages",
                fix="write the prompts as text, or give the tokenizer a chat template",
            )
        return list(tokenizer.encode(row.prompt))
    messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # templates raise what they like: TemplateError, TypeError, KeyError ...
        raise CapreseError(
            where,
            expected="messages that the chat template renders",
            found=f"{type(error).__name__}: {error}",
            fix="correct the line",
        ) from None


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples to fit and samples held out: a tenth, at least one, drawn the same way every time.

    Drawn, not every tenth: data whose kinds of problems take turns would hold out one kind only.
    """
    held = set(random.Random(0).sample(range(len(samples)), max(1, len(samples) // 10)))
    return [s for i, s in enumerate(samples) if i not in held], [samples[i] for i in sorted(held)]
