"""The settings of `caprese calibrate`; imports neither torch nor transformers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from caprese_kernels.config import Score
from caprese_kernels.errors import CapreseError

from ..config import AdapterSettings
from ..options import Group, Integer, Number, Option, flag

SAMPLES = 128
PRIOR, CORE = 0.5, 1.0  # of GRIFFIN, unless given


class CalibrateConfig(AdapterSettings):
    """Settings of a calibration; `caprese_distill.calibrate.job.calibrate` makes the file.

    A wrong value, an unknown name and options that exclude each other raise CapreseError.
    """

    samples: Annotated[Integer, Field(ge=2), Option(Group.DATA, "Most rows to use, drawn with --seed.", "N")] = SAMPLES
    score: Annotated[
        Score,
        Option(Group.METHOD, "What ranks neurons: their part of the output (weighted), or |z| alone (paper)."),
    ] = "weighted"
    prior: Annotated[
        Annotated[Number, Field(ge=0.0, le=1.0)] | None,
        Option(Group.METHOD, "Weight of the data beside a request's own prompt. Default: 0.5 for griffin.", "X"),
    ] = None
    core: Annotated[
        Annotated[Number, Field(ge=0.0, le=1.0)] | None,
        Option(
            Group.METHOD,
            "Share of the kept neurons that all requests have in common, chosen by the data. Default: 1 for griffin.",
            "X",
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Prior and core that are not given: those of the method."""
        griffin = values.get("method", "griffin") == "griffin"
        defaults = {"prior": PRIOR if griffin else 0.0, "core": CORE if griffin else 0.0}
        return values | {name: value for name, value in defaults.items() if values.get(name) is None}

    @model_validator(mode="after")
    def _check_combinations(self) -> CalibrateConfig:
        for name in ("prior", "core"):
            if self.method == "cats" and getattr(self, name):
                raise CapreseError(
                    name,
                    expected="0 with --method cats, whose neurons are chosen token by token",
                    found=f"{getattr(self, name):g}",
                    fix=f"leave out {flag(name)}",
                )
        return self

    def command(self) -> list[str]:
        """The words of a `caprese calibrate` command that makes the same file: every option, defaults included."""
        return ["caprese", "calibrate", self.model, *self.words()]
