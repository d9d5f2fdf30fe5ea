"""Rows of the latency benchmark: times, ratios to Full, and the bytes that a step must read."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean, median, quantiles

from ..kernels.floor import step_bytes, step_flops
from ..results.report import Row
from ..results.stats import iqr
from .latency_cases import Case
from .latency_measure import Run
from .process import Answer, first_token, next_token
from .timed_model import TimedModel


def rows(case: Case, model: TimedModel, runs: list[Run], bandwidth: float) -> list[Row]:
    """A row for each variant; `bandwidth` in GB/s.

    Times are medians over rounds with interquartile ranges. A ratio is to Full in the same round; `predicted_ratio` is
    that of the bytes which a step must read.
    """
    full = [means(answer) for answer in runs[0].answers]

    def needed(run: Run) -> float:
        sparse, added = len(model.layers(run.variant)), model.added(run.variant)
        context = case.prompt + case.generated / 2
        return step_bytes(
            model.weights, run.variant.method, sparse, run.union_share, added, context, case.requests, model.itemsize
        )

    def flops(run: Run) -> float:
        kept, added = run.counted.get("kept_share", 1.0), model.added(run.variant)
        return step_flops(model.weights, run.variant.method, len(model.layers(run.variant)), kept, added)

    made = []
    for run in runs:
        own = [means(answer) for answer in run.answers]
        gaps = [b - a for answer in run.answers for times in answer["times"] for a, b in pairwise(times)]
        ratios, e2e, steps = (
            [ours[name] / theirs[name] for ours, theirs in zip(own, full, strict=True)]
            for name in ("tpot", "e2e", "step")
        )
        tpot = median(each["tpot"] for each in own)
        centiles = quantiles(gaps, n=100, method="inclusive")
        row = case.key(model, run.variant) | {"dummy_weights": model.dummy, "rounds": len(own)}
        for name, scale in (("e2e", 1), ("ttft", 1), ("tpot", 1e3)):
            unit = "ms" if scale > 1 else "s"
            values = [scale * each[name] for each in own]
            row |= {f"{name}_{unit}": median(values), f"{name}_iqr_{unit}": iqr(values)}
        row |= {"tpot_p50_ms": 1e3 * centiles[49], "tpot_p99_ms": 1e3 * centiles[98]}
        row |= {"tokens_per_s": case.requests / tpot, "ratio": median(ratios), "ratio_iqr": iqr(ratios)}
        row |= {"step_ratio": median(steps), "throughput_ratio": 1 / median(steps)}
        row |= {"predicted_ratio": needed(run) / needed(runs[0]), "predicted_flop_ratio": flops(run) / flops(runs[0])}
        row |= {"e2e_ratio": median(e2e)}
        row |= {"full_tpot_ms": 1e3 * median(each["tpot"] for each in full), "mb_a_step": needed(run) / 1e6}
        row |= {"gb_s": needed(run) / tpot / 1e9, "bandwidth_share": needed(run) / tpot / 1e9 / bandwidth}
        made.append(row | {"union_share": run.union_share if run.variant.method else None} | run.counted)
    return made


def means(answer: Answer) -> dict[str, float]:
    """Seconds of one round: to the end of the last answer ("e2e"); to the first ("ttft") and the next token ("tpot"),
    means over requests; and the median step ("step"), which no other request's prompt lengthens."""
    last = max(times[-1] for times in answer["times"])
    step = median(b - a for times in answer["times"] for a, b in pairwise(times))
    return {"e2e": last, "ttft": mean(first_token(answer)), "tpot": mean(next_token(answer)), "step": step}
