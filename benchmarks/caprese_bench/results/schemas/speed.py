"""Rows of the benchmarks that time something: kernels, engines, distillation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Amount, Count, Positive, PositiveCount, Row, Share


class Kernels(Row):
    """FF kernels. `time_us` is the median of interleaved samples, `ratio` that time / the dense block's."""

    section: Literal["shapes", "batch", "density", "overlap", "core", "statistics"]
    shape: str
    hidden_size: PositiveCount
    neurons: PositiveCount
    tokens: PositiveCount
    method: Literal["dense", "griffin", "cats", "core"]
    kernel: str
    candidates: str | None = Field(
        None, description="for the dense block: every implementation that was timed, with its time"
    )
    density: Share | None = None
    rank: Count | None = None
    selection: Literal["independent", "shared", "overlap", "kernel", "products"] | None = None
    overlap: Share | None = Field(None, description="share of a selection's neurons that all selections have in common")
    mean_overlap: Share | None = Field(None, description="mean over pairs of selections of |A and B| / k")
    kept_share: Share | None = Field(None, description="share of the neurons that a token keeps")
    union: Count | None = Field(None, description="neurons that some token of the batch keeps")
    required_mb: Positive = Field(description="10^6 bytes of weights that the batch needs")
    error: Amount = Field(description="largest relative difference of a token's output from the reference")
    time_us: Positive
    min_us: Positive
    iqr_us: Amount
    gb_s: Positive = Field(description="10^9 required bytes a second, at the median time")
    bandwidth_gb_s: Positive = Field(description="the memory's bandwidth, measured between the samples")
    bandwidth_share: Positive
    ratio: Positive
    samples: PositiveCount


class Latency(Row):
    """Table 4. Times are medians over rounds; `ratio` is time to next token / Full's in the same round."""

    section: Annotated[str, Field(pattern=r"^(one request|distinct prompts|samples of one prompt), .+$")]
    arch: str
    setup: Annotated[str, Field(pattern=r"^[1-9]\d*\+[1-9]\d*$", description="prompt + generated tokens")]
    batch: PositiveCount = Field(description="different prompts at once")
    samples: PositiveCount = Field(description="answers to each prompt")
    variant: str
    dummy_weights: bool
    rounds: PositiveCount
    e2e_s: Positive = Field(description="from the arrival of all requests to the end of the last answer")
    e2e_iqr_s: Amount
    ttft_s: Positive = Field(description="time to the first token, mean over requests")
    ttft_iqr_s: Amount
    tpot_ms: Positive = Field(description="time to the next token, mean over tokens and requests")
    tpot_iqr_ms: Amount
    tpot_p50_ms: Positive = Field(description="median over all tokens of all rounds")
    tpot_p99_ms: Positive
    tokens_per_s: Positive = Field(description="of all requests together, while they generate")
    ratio: Positive
    ratio_iqr: Amount
    step_ratio: Positive | None = Field(None, description="median step of a round / Full's, which no prompt lengthens")
    throughput_ratio: Positive | None = Field(None, description="tokens/s in such steps / Full's")
    predicted_ratio: Positive = Field(description="bytes of a step / Full's")
    predicted_flop_ratio: Positive | None = Field(None, description="operations of a token with weights / Full's")
    e2e_ratio: Positive
    full_tpot_ms: Positive = Field(description="Full's tpot_ms in the same rounds")
    mb_a_step: Positive = Field(description="10^6 bytes that a step must read, KV cache included")
    gb_s: Positive = Field(description="10^9 of these bytes a second, at the time to next token")
    bandwidth_share: Positive = Field(description="share of the bandwidth in the provenance")
    union_share: Share | None = Field(
        description="share of the neurons that some request keeps; CATS: as if independent"
    )
    sparse_tokens: Count | None = Field(None, description="tokens that the engine counted in sparse FF blocks")
    ff_weights_read: Share | None = Field(
        None, description="share of all FF weights that a token needed, by the engine's counters"
    )
    kept_share: Share | None = Field(
        None, description="share of a sparse layer's neurons that a token keeps, by these counters"
    )
    kernel: str | None = None


class Decode(Row):
    """A decode step without vLLM. `time_ms` is the median of interleaved samples."""

    section: Literal["decode"]
    arch: str
    context: PositiveCount = Field(description="tokens in a request's KV cache")
    batch: PositiveCount
    variant: str
    kernel: str
    error: Amount = Field(description="largest relative difference of a token's FF output from the reference")
    time_ms: Positive
    iqr_ms: Amount
    ratio: Positive = Field(description="time / Full's")
    predicted_ratio: Positive = Field(description="bytes of a step / Full's")
    mb_a_step: Positive = Field(description="10^6 bytes that a step must read, KV cache included")
    gb_s: Positive
    bandwidth: str = Field(description="the calls that measured the memory's bandwidth between the samples")
    bandwidth_gb_s: Positive
    bandwidth_share: Positive
    samples: PositiveCount


class Prefix(Row):
    """Prefix caching. Times are medians over rounds of the mean over requests, `ratio` is time / plain vLLM's."""

    section: str
    arch: str
    variant: Literal["plain", "griffin", "cats"]
    requests: PositiveCount
    prompt_tokens: PositiveCount
    cached_tokens: Count
    cached_share: Amount | None = Field(description="cached tokens / plain vLLM's")
    ttft_s: Positive
    ttft_iqr_s: Amount
    ratio: Positive
    ratio_iqr: Amount
    rounds: PositiveCount


class DistillSpeed(Row):
    """Speed of distillation, with random weights and samples."""

    arch: str
    method: Literal["griffin", "cats"]
    stage: Literal["layer-wise, closed form", "end to end"]
    samples: PositiveCount
    tokens: PositiveCount
    seconds: Positive = Field(description="time that grows with the number of samples")
    solving_s: Amount = Field(description="time to solve the closed form, once for all samples")
    tokens_per_s: Positive
    samples_per_s: Positive
    paper_hours: Positive = Field(description="hours for 20,000 such samples, with three epochs end to end")
    peak_gib: Positive = Field(description="peak memory of the GPU's tensors, or on a CPU of the process so far")
