"""The cases of `caprese bench latency`: prompt and generated tokens, and how many requests run at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from caprese_kernels.errors import CapreseError, quote

from ..results.lists import counts
from ..results.report import Row

if TYPE_CHECKING:
    from .timed_model import TimedModel
    from .variants import Variant

ONE, BATCH, SAMPLES = "one request", "distinct prompts", "samples of one prompt"  # sections


@dataclass(frozen=True)
class Case:
    """`batch` different prompts of `prompt` tokens at once, with `samples` answers of `generated` tokens to each."""

    section: str
    prompt: int
    generated: int
    batch: int = 1
    samples: int = 1

    @property
    def requests(self) -> int:
        """Answers that are generated at once."""
        return self.batch * self.samples

    def key(self, model: TimedModel, variant: Variant) -> Row:
        """The columns that name the variant's row."""
        return {
            "section": f"{self.section}, {model.name}",
            "arch": model.name,
            "setup": f"{self.prompt}+{self.generated}",
            "batch": self.batch,
            "samples": self.samples,
            "variant": variant.label,
        }


def make_cases(setups: str, batch: str, samples: str) -> list[Case]:
    """The setups with one request each, then the numbers of prompts and of samples, both in the first setup.

    Raises CapreseError if --setups, --batch or --n cannot be read.
    """
    pairs = []
    for text in setups.split(","):
        prompt, _, generated = text.strip().partition("+")
        digits = re.fullmatch(r"[0-9]{1,9}\+[0-9]{1,9}", text.strip())
        if not (digits and int(prompt) and int(generated) > 1):
            raise CapreseError(
                "--setups",
                expected="P+G, for example 2048+256: prompt tokens from 1, generated tokens from 2",
                found=quote(text),
                fix="correct the list",
            )
        pairs.append((int(prompt), int(generated)))
    cases = [Case(ONE, *pair) for pair in pairs]
    cases += [Case(BATCH, *pairs[0], batch=count) for count in counts("--batch", batch)]
    return cases + [Case(SAMPLES, *pairs[0], samples=count) for count in counts("--n", samples)]
