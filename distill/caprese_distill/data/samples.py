"""From rows to token ids, cut as in serving: prompt tokens first, generated tokens after."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chat import Prompt, prompt_ids


@dataclass(frozen=True)
class Row:
    """One row of the data."""

    line: int  # line of the file, or row of the dataset, counted from 1
    prompt: Prompt
    response: str  # empty if it is still to be generated


@dataclass(frozen=True, eq=False)
class Sample:
    """The tokens of one row that a server would feed to the model; `line` names the row in errors."""

    ids: Tensor  # [T] int32; the last token sampled is never fed, so it is not here
    prompt_length: int
    line: int

    @classmethod
    def of(cls, prompt: Sequence[int], response: Sequence[int], line: int) -> Sample:
        """From the token ids of a prompt and of all tokens sampled after it, of which the last is never fed."""
        return cls(torch.tensor([*prompt, *response[:-1]], dtype=torch.int32), len(prompt), line)

    @property
    def num_rows(self) -> int:
        """The number of generated tokens that are fed: those of index >= prompt length."""
        return len(self.ids) - self.prompt_length


def encode(
    tokenizer: Any, rows: Sequence[Row], max_length: int, advance: Callable[[], object] = lambda: None
) -> tuple[list[Sample], Counter[str]]:
    """Token ids of the rows, and the number of skipped rows by reason. `advance` is called after each row.

    The prompt is encoded by `prompt_ids`. The response is encoded separately, because a model that generates it never
    merges its first characters with the prompt's last; special tokens written in it become their ids, as when
    generated. The eos token that ends it was sampled but never fed; if the tokenizer has no eos token, that holds for
    the response's last token.
    """
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    for row in rows:
        prompt = prompt_ids(tokenizer, row.prompt, row.line)
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


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples to fit and samples held out: a tenth, at least one, drawn with a fixed seed.

    They are drawn at random because every tenth row of data that alternates between kinds of problems may be of one
    kind.
    """
    held = set(random.Random(0).sample(range(len(samples)), max(1, len(samples) // 10)))
    return [s for i, s in enumerate(samples) if i not in held], [samples[i] for i in sorted(held)]
