"""From rows to token ids, cut as in serving: prompt tokens first, generated tokens after."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bad_rows import BadRow, BadRows
from .chat import ChatRenderer
from .rows import Row


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
    renderer: ChatRenderer,
    rows: Sequence[Row],
    max_length: int,
    bad_rows: BadRows | None = None,
    advance: Callable[[], object] = lambda: None,
) -> tuple[list[Sample], Counter[str]]:
    """Token ids of the rows, and the number of skipped rows by reason. `advance` is called after each row.

    `ChatRenderer.ids` makes them. The token that ends a response was sampled but never fed; if the tokenizer has none,
    that holds for the response's last token. Rows that the template does not render are added to `bad_rows` and left
    out; without it, CapreseError for the first.
    """
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    for row in rows:
        advance()
        try:
            prompt, response = renderer.ids(row)
        except BadRow as bad:
            if bad_rows is None:
                raise bad.at(f"data, line {row.line}") from None
            bad_rows.add(row.line, bad)
            continue
        if len(prompt) + len(response) > max_length:
            skipped[f"longer than {max_length} tokens"] += 1
        elif not prompt:
            skipped["empty prompt"] += 1
        elif len(response) < 2:
            skipped["empty response"] += 1
        else:
            samples.append(Sample.of(prompt, response, row.line))
    return samples, skipped


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples to fit and samples held out: a tenth, at least one, drawn with a fixed seed.

    They are drawn at random because every tenth row of data that alternates between kinds of problems may be of one
    kind.
    """
    held = set(random.Random(0).sample(range(len(samples)), max(1, len(samples) // 10)))
    return [s for i, s in enumerate(samples) if i not in held], [samples[i] for i in sorted(held)]
