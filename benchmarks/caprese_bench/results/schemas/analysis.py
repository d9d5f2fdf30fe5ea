"""Rows of the analyses without an engine: parameters, and what low-rank corrections recover (figures 2, 5, 6)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .fields import Amount, Count, Difference, Positive, PositiveCount, Row, Share


class Parameters(Row):
    """Figure 6: `added` counts the values of all L and R; `cut_*` is the share of the model's parameters that a
    generated token no longer needs, net of them."""

    section: str
    family: str
    model: str
    rank: PositiveCount
    density: Share
    parameters: PositiveCount
    parameters_b: Positive = Field(description="the same in units of 10^9")
    ff_parameters: PositiveCount
    added: PositiveCount
    added_of_model: Share
    added_of_ff: Share
    cut_griffin: Difference
    cut_cats: Difference


class Residual(Row):
    """Figure 2: ||error|| / ||FF(X)|| of generated tokens, mean over layers."""

    section: str
    correction: Literal["oracle", "trained"]
    density: Share
    rank: Count
    error: Amount
    error_best_layer: Amount
    error_worst_layer: Amount


class Selection(Row):
    """What a selection costs without L, R, teacher-forced: KL(original || sparse) in nats and the share of tokens whose
    most likely successor stays the same, means over samples with their standard errors."""

    section: str
    density: Share
    score: Literal["paper", "weighted"]
    prior: Share = Field(description="lambda, the prior's weight")
    core: Share = Field(description="kappa, the share of a selection that all requests have in common")
    prior_data: str | None = Field(description="the domain whose responses made the prior; mixture: the mean of all")
    data: str = Field(description="the domain of the measured samples")
    kl: Amount
    kl_stderr: Amount
    agreement: Share
    agreement_stderr: Amount
    tokens: PositiveCount
    samples: PositiveCount


class Ablation(Row):
    """Figure 5: accuracy with one standard error, and mean tokens of a response; rank 0 is the plain method."""

    section: str
    stage: Literal["layer-wise", "end-to-end"] | None = None
    density: Share | None = None
    rank: Count | None = None
    remaining: Amount | None = Field(
        None, description="share of the squared error of eq. 7 that L and R leave, mean over layers"
    )
    hidden_error_before: Amount | None = Field(None, description="relative squared error of eq. 8 on held-out samples")
    hidden_error: Amount | None = None
    math: Share
    math_stderr: Amount
    math_tokens: Amount
    reading: Share
    reading_stderr: Amount
    reading_tokens: Amount


class Recovery(Row):
    """Tables 1 and 5 on the demo model. `*_recovered` is a share of the loss, None where no loss is significant."""

    section: str
    variant: str
    problems: PositiveCount
    parameters: Count
    seconds: Amount = Field(description="wall time of the training, all stages")
    ff_error: Amount = Field(description="relative squared error of eq. 7 on held-out samples, mean over layers")
    hidden_error: Amount = Field(description="relative squared error of eq. 8 on held-out samples")
    math: Share
    math_stderr: Amount
    math_below_full: Difference
    math_below_full_stderr: Amount
    math_recovered: Difference | None
    math_recovered_stderr: Amount | None
    reading: Share
    reading_stderr: Amount
    reading_below_full: Difference
    reading_below_full_stderr: Amount
    reading_recovered: Difference | None
    reading_recovered_stderr: Amount | None
