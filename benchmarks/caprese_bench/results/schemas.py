"""The format of every result file: what each column of each benchmark's rows holds, and in which unit.

`caprese bench validate FILE...` holds files to it, and `json_schema(name)` is the same as a JSON Schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from caprese_kernels.errors import CapreseError

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Difference = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(ge=1)]


class Row(BaseModel):
    """One case of a benchmark."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Kernels(Row):
    """FF kernels; `time_us` is the median of interleaved samples, `ratio` is to the dense block of the same group."""

    section: Literal["shapes", "batch", "density", "overlap", "statistics"]
    shape: str
    hidden_size: Some
    neurons: Some
    tokens: Some
    method: Literal["dense", "griffin", "cats"]
    kernel: str
    candidates: str | None = Field(None, description="dense: every implementation that was tried, with its time")
    density: Share | None = None
    rank: Count | None = None
    selection: Literal["independent", "shared", "overlap"] | None = None
    overlap: Share | None = Field(None, description="neurons common to all selections, of those a selection keeps")
    mean_overlap: Share | None = Field(None, description="mean over pairs of selections")
    kept_share: Share | None = Field(None, description="neurons kept by a token, of all")
    union: Count | None = Field(None, description="neurons that some token of the batch keeps")
    required_mb: Positive = Field(description="10^6 bytes of weights that the batch needs")
    error: Amount = Field(description="largest relative difference of a token's output from the reference")
    time_us: Positive
    min_us: Positive
    iqr_us: Amount
    gb_s: Positive = Field(description="required bytes by median time")
    bandwidth_gb_s: Positive = Field(description="the memory's pace, measured among the samples")
    bandwidth_share: Positive
    ratio: Positive
    samples: Some


class Latency(Row):
    """Table 4. Times are medians over rounds; `ratio` is of times to next token, to Full's in the same round."""

    section: Annotated[str, Field(pattern=r"^(one request|distinct prompts|samples of one prompt), .+$")]
    arch: str
    setup: Annotated[str, Field(pattern=r"^[1-9]\d*\+[1-9]\d*$", description="prompt + generated tokens")]
    batch: Some = Field(description="different prompts at once")
    samples: Some = Field(description="answers to each prompt")
    variant: str
    dummy_weights: bool
    rounds: Some
    e2e_s: Positive = Field(description="from the arrival of all requests to the last answer's end")
    e2e_iqr_s: Amount
    ttft_s: Positive = Field(description="to the first token, mean over requests")
    ttft_iqr_s: Amount
    tpot_ms: Positive = Field(description="to the next token, mean over tokens and requests")
    tpot_iqr_ms: Amount
    tpot_p50_ms: Positive = Field(description="over all tokens of all rounds")
    tpot_p99_ms: Positive
    tokens_per_s: Positive = Field(description="of all requests, while they generate")
    ratio: Positive
    ratio_iqr: Amount
    predicted_ratio: Positive = Field(description="of the bytes of a step to Full's")
    e2e_ratio: Positive
    full_tpot_ms: Positive = Field(description="Full's, in the same rounds")
    mb_a_step: Positive = Field(description="10^6 bytes that a step must read, KV cache included")
    gb_s: Positive = Field(description="these bytes by the time to next token")
    bandwidth_share: Positive = Field(description="of the pace in the provenance")
    union_share: Share | None = Field(description="neurons that some request keeps; CATS: as if independent")
    sparse_tokens: Count | None = Field(None, description="that the engine counted in sparse FF blocks")
    ff_weights_read: Share | None = Field(None, description="by the engine's count, of a token")
    kept_share: Share | None = Field(None, description="neurons of a sparse layer that a token keeps, by that count")
    kernel: str | None = None


class Decode(Row):
    """A decode step without vLLM; `time_ms` is the median of interleaved samples, `error` that of its FF blocks."""

    section: Literal["decode"]
    arch: str
    context: Some = Field(description="tokens in a request's KV cache")
    batch: Some
    variant: str
    kernel: str
    error: Amount = Field(description="largest relative difference of a token's FF output from the reference")
    time_ms: Positive
    iqr_ms: Amount
    ratio: Positive = Field(description="to Full")
    predicted_ratio: Positive = Field(description="of the bytes of a step to Full's")
    mb_a_step: Positive = Field(description="10^6 bytes that a step must read, KV cache included")
    gb_s: Positive
    bandwidth: str = Field(description="what measured the memory's pace, among the samples")
    bandwidth_gb_s: Positive
    bandwidth_share: Positive
    samples: Some


class Exactness(Row):
    """The demo model through vLLM: answers equal to Hugging Face's in float32; accuracies in bfloat16."""

    section: Literal["float32, token by token", "bfloat16, graded"]
    variant: str
    kernel: str
    problems: Some
    tokens: Count = Field(description="of all answers")
    equal: Count | None = Field(None, description="answers with Hugging Face's tokens")
    math: Share | None = None
    math_stderr: Amount | None = None
    reading: Share | None = None
    reading_stderr: Amount | None = None
    sparse_tokens: Count | None = Field(None, description="that the engine counted in sparse FF blocks")
    ff_weights_read: Share | None = Field(None, description="by the engine's count, of a token")


class Prefix(Row):
    """Prefix caching; times are medians over rounds of the mean over requests, `ratio` is to plain vLLM."""

    section: str
    arch: str
    variant: Literal["plain", "griffin", "cats"]
    requests: Some
    prompt_tokens: Some
    cached_tokens: Count
    cached_share: Amount | None = Field(description="cached tokens by plain vLLM's")
    ttft_s: Positive
    ttft_iqr_s: Amount
    ratio: Positive
    ratio_iqr: Amount
    rounds: Some


class Parameters(Row):
    """Figure 6: `added` are the values of all L and R, `cut_*` active parameters spared, net of them, of the model."""

    section: str
    family: str
    model: str
    rank: Some
    density: Share
    parameters: Some
    parameters_b: Positive = Field(description="10^9")
    ff_parameters: Some
    added: Some
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


class Ablation(Row):
    """Figure 5: accuracy with one standard error, and mean tokens of a response; rank 0 is the plain method."""

    section: str
    stage: Literal["layer-wise", "end-to-end"] | None = None
    density: Share | None = None
    rank: Count | None = None
    remaining: Amount | None = Field(None, description="error's energy that L, R leave, mean over layers (eq. 7)")
    hidden_error_before: Amount | None = Field(None, description="relative squared error of eq. 8 on held-out samples")
    hidden_error: Amount | None = None
    math: Share
    math_stderr: Amount
    math_tokens: Amount
    reading: Share
    reading_stderr: Amount
    reading_tokens: Amount


class Recovery(Row):
    """Tables 1 and 5 on the demo model. `*_recovered` is a share of the loss, None where no loss shows."""

    section: str
    variant: str
    problems: Some
    parameters: Count
    seconds: Amount = Field(description="of training, all stages")
    ff_error: Amount = Field(description="relative squared error of eq. 7 on held-out samples, mean over layers")
    hidden_error: Amount = Field(description="that of eq. 8")
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


class DistillSpeed(Row):
    """Pace of distillation, random weights and samples."""

    arch: str
    method: Literal["griffin", "cats"]
    stage: Literal["layer-wise, closed form", "end to end"]
    samples: Some
    tokens: Some
    seconds: Positive = Field(description="that grow with the samples")
    solving_s: Amount = Field(description="the closed form's, once")
    tokens_per_s: Positive
    samples_per_s: Positive
    paper_hours: Positive = Field(description="of 20,000 such samples, three epochs of them end to end")
    peak_gib: Positive = Field(description="of the GPU's tensors, or on a CPU of the process until then")


class Accuracy(Row):
    """Tables 1 and 2 through a served model. Scores are shares, one a problem: the mean over its runs."""

    section: str
    task: str
    model: str
    variant: str
    metric: str = Field(description="what a score is")
    problems: Some
    runs: Some
    score: Share
    stderr: Amount = Field(description="standard error of the mean over problems")
    run_std: Amount | None = Field(description="sample standard deviation of the runs' means")
    difference: Difference | None = Field(None, description="to Full, on the same problems")
    difference_low: Difference | None = Field(None, description="95% paired bootstrap interval over problems")
    difference_high: Difference | None = None
    won: Count | None = Field(None, description="problems that Full got wrong and this variant right")
    lost: Count | None = Field(None, description="the other way round")
    mcnemar_p: Share | None = Field(None, description="exact, two-sided; of single runs that are right or wrong")
    tokens: Amount = Field(description="of a response, mean")
    cut_off: Share = Field(description="responses that the limit of tokens ended")
    sparse_tokens: Count = Field(description="that the server counted in sparse FF blocks; of Full none")
    ff_weights_read: Share | None = Field(description="by the server's count, of a token")
    published_row: str | None = Field(description="the row of the paper's table, where it has the task and model")
    published: Share | None = Field(description="the paper's score")
    published_std: Amount | None = Field(description="its standard deviation over runs")
    published_difference: Difference | None = Field(description="the paper's, to Full")


class Coverage(Row):
    """Figure 3: Pass@K, mean over problems, then mean and sample standard deviation over pools."""

    section: str
    model: str
    variant: str
    k: Some
    activated: Share = Field(description="A: parameters that a generated token needs, of all")
    compute: Positive = Field(description="k x activated")
    coverage: Share
    coverage_std: Amount | None
    problems: Some
    samples: Some = Field(description="of a problem in a pool")
    pools: Some
    tokens: Amount = Field(description="of a sample, mean")
    sparse_tokens: Count = Field(description="that the server counted in sparse FF blocks; of Full none")
    ff_weights_read: Share | None = Field(description="by the server's count, of a token")


class Length(Row):
    """Figures 4 and 7: tokens of a response, the mean over problems of one difficulty, or all."""

    section: str
    model: str
    variant: str
    difficulty: str
    problems: Some
    runs: Some
    tokens: Amount
    stderr: Amount = Field(description="standard error of the mean over problems")
    ratio: Positive | None = Field(description="to Full's")
    cut_off: Share | None = Field(description="responses that the limit of tokens ended; of all problems")


class Check(Row):
    """A step of `make gpu-check`."""

    step: str
    stage: Literal["a", "b"]
    status: Literal["passed", "failed", "out of time", "no tests", "skipped"]
    seconds: Amount
    given_seconds: float | None = None
    returncode: int | None = None
    command: str | None = None
    output: str | None = Field(None, description="its end")


ROWS: dict[str, type[Row]] = {
    "kernels": Kernels,
    "latency": Latency,
    "decode": Decode,
    "exactness": Exactness,
    "prefix": Prefix,
    "parameters": Parameters,
    "residual": Residual,
    "ablation": Ablation,
    "recovery": Recovery,
    "accuracy": Accuracy,
    "coverage": Coverage,
    "length": Length,
    "distill-speed": DistillSpeed,
    "check": Check,
}


class Provenance(BaseModel):
    """Where figures come from; benchmarks add what is theirs."""

    model_config = ConfigDict(extra="allow", strict=True)
    command: str
    git_commit: str | None
    time: str = Field(description="ISO 8601, UTC")
    hardware: dict[str, Any]
    versions: dict[str, str | None]
    settings: dict[str, Any] = Field(default_factory=dict, description="what holds for all rows")
    note: str | None = Field(None, description="written by hand: what whoever measured noticed")


AnyRow = TypeVar("AnyRow", bound=Row)
Schema = TypeVar("Schema", bound=BaseModel)


class ResultFile(BaseModel, Generic[AnyRow]):
    """NAME.json."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    provenance: Provenance
    keys: list[str] = Field(description="columns that name a case")
    measures: list[str] = Field(description="columns that `caprese bench compare` sets side by side")
    rows: list[AnyRow]
    errors: list[str] = Field(description="cases that failed, which have no row")
    partial: bool = Field(description="the run was stopped before its end")


def file_model(name: str) -> type[ResultFile[Any]]:
    """The format of NAME.json; CapreseError for an unknown benchmark."""
    if name not in ROWS:
        raise CapreseError("benchmark", expected=f"one of {', '.join(ROWS)}", found=repr(name), fix="correct it")
    return ResultFile[ROWS[name]]  # type: ignore[valid-type]


def json_schema(name: str) -> dict[str, Any]:
    """The same as a JSON Schema."""
    return file_model(name).model_json_schema()


def check(path: Path) -> int:
    """The number of rows in a result's file; CapreseError with the first thing that is not as it should be."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CapreseError(
            f"result {path}", expected="a JSON file that a benchmark wrote", found=reason, fix="correct the path"
        ) from None
    if isinstance(found, dict) and "name" not in found:
        from caprese_serve.demo.results import DemoReport

        return len(parse(DemoReport, found, str(path)).rows)
    result = parse(file_model(found["name"] if isinstance(found, dict) else ""), found, str(path))
    columns = set(ROWS[result.name].model_fields)
    if unknown := [column for column in (*result.keys, *result.measures) if column not in columns]:
        raise CapreseError(
            str(path), expected="keys and measures among the columns", found=unknown[0], fix="correct it"
        )
    cases = [tuple(getattr(row, key) for key in result.keys) for row in result.rows]
    if len(set(cases)) < len(cases):
        twice = next(case for case in cases if cases.count(case) > 1)
        raise CapreseError(str(path), expected="a row for each case", found=f"two for {twice}", fix="measure it anew")
    return len(cases)


def parse(schema: type[Schema], found: Any, where: str, fix: str = "measure it anew") -> Schema:
    """`schema.model_validate`, with the first mistake as a CapreseError."""
    try:
        return schema.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        rule = "no such key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise CapreseError(
            ": ".join((where, ".".join(map(str, first["loc"])))).removesuffix(": "),
            expected=rule[0].lower() + rule[1:],
            found="nothing" if first["type"] == "missing" else repr(first["input"]),
            fix=fix,
        ) from None
