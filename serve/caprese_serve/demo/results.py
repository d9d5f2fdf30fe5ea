"""The demo's results: the schema of out/demo.json, the table, and the remarks below it."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any, Literal

from pydantic import BaseModel, Field
from rich.table import Table

from caprese_kernels.errors import CapreseError


class Score(BaseModel):
    """The graded answers to one task."""

    marks: str = Field(min_length=1, description="a character for each problem: 1 correct, 0 wrong")
    accuracy: float = Field(ge=0, le=1)
    stderr: float = Field(ge=0, description="binomial standard error of the accuracy")

    @classmethod
    def of(cls, correct: list[bool]) -> Score:
        """The score of graded answers; at least one."""
        share = sum(correct) / len(correct)
        marks = "".join(str(int(mark)) for mark in correct)
        return cls(marks=marks, accuracy=share, stderr=sqrt(share * (1 - share) / len(correct)))

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ± {100 * self.stderr:.1f}"

    def gain_over(self, other: Score) -> tuple[float, float]:
        """The difference of the accuracies on the same problems, and its standard error (paired samples)."""
        each = [int(a) - int(b) for a, b in zip(self.marks, other.marks, strict=True)]
        mean = sum(each) / len(each)
        return mean, sqrt(sum((x - mean) ** 2 for x in each)) / len(each)


class Served(BaseModel):
    """A server's report at /caprese: its method, and the tokens generated and the share of FF weights read so far."""

    method: str | None
    density: float
    rank: int
    layers: list[int]
    kernel: str | None
    score: Literal["paper", "weighted"] = "paper"
    prior: float = 0.0
    core: float = 0.0
    generated_tokens: int
    ff_weights_read: float | None

    @classmethod
    def dense(cls) -> Served:
        """The report of a server without Caprese, whose tokens need all weights."""
        return cls(method=None, density=1, rank=0, layers=[], kernel=None, generated_tokens=0, ff_weights_read=1)

    def share_since(self, before: Served) -> float:
        """The share of FF weights that the tokens generated after `before` needed. Raises CapreseError if none were."""
        if self.method is None:
            return 1.0
        tokens = self.generated_tokens - before.generated_tokens
        if tokens <= 0 or self.ff_weights_read is None:
            raise CapreseError(
                "GET /caprese",
                expected="a count of the generated tokens that grows",
                found=f"{tokens} tokens",
                fix="report this bug",
            )
        read = self.ff_weights_read * self.generated_tokens - (before.ff_weights_read or 0) * before.generated_tokens
        return read / tokens


class Row(BaseModel):
    """The results of one variant; accuracies and weights read are fractions."""

    variant: str
    math_accuracy: float = Field(ge=0, le=1)
    reading_accuracy: float = Field(ge=0, le=1)
    mean_tokens: float = Field(gt=0, description="generated tokens of a response")
    tokens_per_s: float = Field(gt=0, description="generated tokens of all requests per second of wall-clock time")
    ff_weights_read: float = Field(gt=0, description="share of all FF weights that a generated token needs")
    math: Score
    reading: Score
    served: Served
    generated_tokens: int = Field(ge=1)
    wall_s: float = Field(gt=0, description="from the first request to the last answer, without warm-up")
    startup_s: float = Field(gt=0, description="from the server's launch to its first answer at /health")


class DemoReport(BaseModel):
    """The file out/demo.json."""

    rows: list[Row]
    provenance: dict[str, Any]

    def row(self, variant: str) -> Row | None:
        """The variant's row, if it was measured."""
        return next((row for row in self.rows if row.variant == variant), None)


def table(rows: list[Row]) -> Table:
    """The table that `caprese demo` prints."""
    shown = Table(title="Held-out problems, greedy, through vllm serve")
    shown.add_column("variant", no_wrap=True)
    for name in ("math", "reading", "tokens", "tokens/s", "FF weights read"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(
            row.variant,
            str(row.math),
            str(row.reading),
            f"{row.mean_tokens:.1f}",
            f"{row.tokens_per_s:.0f}",
            f"{row.ff_weights_read:.1%}",
        )
    return shown


def remarks(report: DemoReport) -> Iterator[str]:
    """The table's findings in sentences: accuracy lost and recovered, and how to read the columns."""
    full = report.row("Full")
    for name in ("GRIFFIN", "CATS"):
        plain, caprese = report.row(name), report.row(f"Caprese ({name})")
        if full and plain:
            yield _loss(full, plain, caprese)
    for row in report.rows[:1]:
        yield (
            f"± is one standard error, from {len(row.math.marks)} math and {len(row.reading.marks)} reading problems "
            "that are not in the training data, the same ones for every variant."
        )
    kernels = {row.served.kernel for row in report.rows if row.served.method}
    if kernels == {"reference"}:
        yield (
            "The reference kernel masks the weights that a token does not need instead of skipping them, so tokens/s "
            "shows no gain here. The last column counts the weights that are needed."
        )
    elif kernels:
        yield (
            "All of this model's weights fit into a processor's cache, so tokens/s shows what Caprese costs a step, "
            "not what reading less gains. The last column counts the weights that are needed."
        )


def _loss(full: Row, plain: Row, caprese: Row | None) -> str:
    used = f"density {plain.served.density:g}, layers {', '.join(map(str, plain.served.layers))}"
    lost, lost_error = full.math.gain_over(plain.math)
    text = f"{plain.variant} ({used}) loses {100 * lost:.1f} ± {100 * lost_error:.1f} points of math accuracy"
    if caprese is None:
        return f"{text}."
    back, error = caprese.math.gain_over(plain.math)
    text += f"; Caprese (rank {caprese.served.rank}) gives back {100 * back:.1f} ± {100 * error:.1f}"
    return f"{text}, {back / lost:.0%} of it." if lost > 2 * lost_error else f"{text}."
