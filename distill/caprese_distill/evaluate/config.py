"""The settings of `caprese evaluate`; imports neither torch nor transformers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..config import DataSettings
from ..options import Group, Integer, Option

SAMPLES = 32


class EvaluateConfig(DataSettings):
    """Settings of an evaluation; `caprese_distill.evaluate.job.evaluate` does it.

    A wrong value and an unknown name raise CapreseError.
    """

    adapter: Annotated[
        str,
        Field(min_length=1),
        Option(Group.MODEL, "Adapter: a file, a directory that holds one, or a Hub id.", "ADAPTER", positional=True),
    ]
    model: Annotated[
        str, Field(min_length=1), Option(Group.MODEL, "Directory or Hub id of the model that it was made for.", "MODEL")
    ]
    samples: Annotated[Integer, Field(ge=1), Option(Group.DATA, "Most rows to use, drawn with --seed.", "N")] = SAMPLES
