"""The model and the samples that an analysis uses: the demo's, or the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprese_kernels.errors import CapreseError
from caprese_serve.demo import MODEL

if TYPE_CHECKING:
    from caprese_distill.data.samples import Sample
    from caprese_kernels.config import BaseModelInfo

MAX_LENGTH = 2048  # tokens; longer samples are left out


@dataclass(frozen=True)
class ModelWithSamples:
    """A model in float32, its tokenizer and dimensions, and samples: prompts with responses."""

    model: Any
    tokenizer: Any
    info: BaseModelInfo
    samples: list[Sample]

    @property
    def tokens(self) -> int:
        """Number of tokens of all samples."""
        return sum(len(sample.ids) for sample in self.samples)


def load_model_with_samples(model: str, data: str | None, count: int) -> ModelWithSamples:
    """The model with `count` samples of `data` (as for `caprese distill --data`), or of the demo's training problems.

    Raises CapreseError if fewer than two samples are usable.
    """
    from caprese_distill.data.chat import ChatRenderer
    from caprese_distill.data.rows import Row
    from caprese_distill.data.samples import encode
    from caprese_distill.data.sources import read_source
    from caprese_distill.data.templates import stop_ids
    from caprese_distill.loading import load_model, load_small_parts
    from caprese_kernels.config import BaseModelInfo
    from caprese_serve.demo.problems import TASKS, problems

    config, tokenizer = load_small_parts(model)
    if data is not None:
        rows = read_source(data, count).rows
    else:
        each = [problems(task, "train", count // len(TASKS), seed=1) for task in TASKS]
        mixed = (problem for group in zip(*each, strict=True) for problem in group)
        rows = [Row(n, problem.prompt, problem.response) for n, problem in enumerate(mixed, start=1)]
    samples, skipped = encode(ChatRenderer(tokenizer, stop_ids=stop_ids(model, config)), rows, MAX_LENGTH)
    if len(samples) < 2:
        raise CapreseError(
            f"samples of {data or 'the demo'}",
            expected="2 or more usable (one is held out)",
            found=f"{len(samples)} of {len(rows)} ({dict(skipped)})",
            fix="give more data",
        )
    name = "demo" if Path(model) == MODEL else model  # not the path, which differs between machines
    return ModelWithSamples(load_model(model, "float32"), tokenizer, BaseModelInfo.from_hf(config, name), samples)
