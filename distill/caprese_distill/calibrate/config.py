"""The settings of `caprese calibrate`; imports neither torch nor transformers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..config import AdapterSettings
from ..options import Group, Integer, Option

SAMPLES = 128


class CalibrateConfig(AdapterSettings):
    """Settings of a calibration; `caprese_distill.calibrate.job.calibrate` makes the file.

    A wrong value, an unknown name and options that exclude each other raise CapreseError.
    """

    samples: Annotated[Integer, Field(ge=2), Option(Group.DATA, "Most rows to use, drawn with --seed.", "N")] = SAMPLES

    allocate: Annotated[
        bool,
        Option(
            Group.METHOD,
            "Give each layer a density of its own: where dropping neurons hurts the next token least; the same bytes "
            "in sum as --density everywhere. One more pass, forward and backward.",
        ),
    ] = False

    def command(self) -> list[str]:
        """The words of a `caprese calibrate` command that makes the same file: every option, defaults included."""
        return ["caprese", "calibrate", self.model, *self.words()]
