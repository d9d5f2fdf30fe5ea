"""Rows of the benchmarks that grade a served model's answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .fields import Amount, Count, Difference, Positive, PositiveCount, Row, Share


class Exactness(Row):
    """The demo model through vLLM: answers that equal Hugging Face's in float32, and accuracies in bfloat16."""

    section: Literal["float32, token by token", "bfloat16, graded"]
    variant: str
    kernel: str
    problems: PositiveCount
    tokens: Count = Field(description="of all answers")
    equal: Count | None = Field(None, description="answers with Hugging Face's tokens")
    math: Share | None = None
    math_stderr: Amount | None = None
    reading: Share | None = None
    reading_stderr: Amount | None = None
    sparse_tokens: Count | None = Field(None, description="tokens that the engine counted in sparse FF blocks")
    ff_weights_read: Share | None = Field(
        None, description="share of all FF weights that a token needed, by the engine's counters"
    )


class Accuracy(Row):
    """Tables 1 and 2 through a served model. A problem's score is a share, the mean over its runs."""

    section: str
    task: str
    model: str
    variant: str
    metric: str = Field(description="how a response is scored")
    problems: PositiveCount
    runs: PositiveCount
    score: Share
    stderr: Amount = Field(description="standard error of the mean over problems")
    run_std: Amount | None = Field(description="sample standard deviation of the runs' means")
    difference: Difference | None = Field(None, description="score less Full's, on the same problems")
    difference_low: Difference | None = Field(None, description="95% paired bootstrap interval over problems")
    difference_high: Difference | None = None
    won: Count | None = Field(None, description="problems that Full got wrong and this variant right")
    lost: Count | None = Field(None, description="problems that Full got right and this variant wrong")
    mcnemar_p: Share | None = Field(
        None, description="McNemar's exact two-sided p, for single runs that are right or wrong"
    )
    tokens: Amount = Field(description="mean tokens of a response")
    cut_off: Share = Field(description="responses that reached the limit of tokens")
    sparse_tokens: Count = Field(description="tokens that the server counted in sparse FF blocks; 0 for Full")
    ff_weights_read: Share | None = Field(
        description="share of all FF weights that a token needed, by the server's counters"
    )
    published_row: str | None = Field(description="the row of the paper's table, where it has the task and model")
    published: Share | None = Field(description="the score that the paper reports")
    published_std: Amount | None = Field(description="its standard deviation over runs")
    published_difference: Difference | None = Field(description="the paper's score less its Full's")


class Coverage(Row):
    """Figure 3: Pass@K, mean over problems, then mean and sample standard deviation over pools."""

    section: str
    model: str
    variant: str
    k: PositiveCount
    activated: Share = Field(description="A: parameters that a generated token needs, of all")
    compute: Positive = Field(description="k x activated")
    coverage: Share
    coverage_std: Amount | None
    problems: PositiveCount
    samples: PositiveCount = Field(description="samples of a problem in a pool")
    pools: PositiveCount
    tokens: Amount = Field(description="mean tokens of a sample")
    sparse_tokens: Count = Field(description="tokens that the server counted in sparse FF blocks; 0 for Full")
    ff_weights_read: Share | None = Field(
        description="share of all FF weights that a token needed, by the server's counters"
    )


class Length(Row):
    """Figures 4 and 7: mean tokens of a response, over the problems of one difficulty or over all."""

    section: str
    model: str
    variant: str
    difficulty: str
    problems: PositiveCount
    runs: PositiveCount
    tokens: Amount
    stderr: Amount = Field(description="standard error of the mean over problems")
    ratio: Positive | None = Field(description="tokens / Full's")
    cut_off: Share | None = Field(
        description="responses that reached the limit of tokens; only for all problems together"
    )
