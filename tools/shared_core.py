"""What docs/performance.md shows of a shared core on a real model: times by number of requests, and accuracies."""

from __future__ import annotations

from pathlib import Path

from caprese_bench.results.report import Result

NAMES = {
    "prior-half": "core 1, first half of the layers",
    "prior-all": "core 1, all layers",
    "prior-all-tail": "core 0.8, all layers",
    "layer-wise": "core 1, first half, L and R",
    "core1-all": "core 1, all layers",
    "core.8-all": "core 0.8, all layers",
}


def table(path: Path) -> list[str]:
    """A row for each number of requests and selection, as shares of Full's in the same round."""
    rows = Result.load(path).rows
    lines = [
        "| requests | Full, ms a token | selection | next token | bytes predict | first token | all of it |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    full = {row["batch"]: row for row in rows if row["variant"] == "Full"}
    for row in rows:
        if row["variant"] in NAMES:
            of = full[row["batch"]]
            lines.append(
                f"| {row['batch']} | {of['tpot_ms']:.1f} | {NAMES[row['variant']]} "
                f"| {row['ratio']:.3f} ± {row['ratio_iqr']:.3f} | {row['predicted_ratio']:.3f} "
                f"| {row['ttft_s'] / of['ttft_s']:.2f} | {row['e2e_s'] / of['e2e_s']:.2f} |"
            )
    return lines


SELECTIONS = {
    "Full": "Full",
    "griffin-half": "GRIFFIN (the paper's), first half of the layers",
    "core1-half": "core 1, first half of the layers",
    "layer-wise": "core 1, first half, L and R layer-wise",
    "end-to-end": "core 1, first half, L and R end to end",
    "blend-half": "blend of prompt and prior, no core, first half",
    "core.8-half": "core 0.8, first half of the layers",
    "core1-all": "core 1, all layers",
    "core.8-all": "core 0.8, all layers",
    "core1-half-d75": "core 1, first half, density 0.75",
    "core1-all-d75": "core 1, all layers, density 0.75",
}


def accuracies(path: Path) -> list[str]:
    """A row for each variant: score with its standard error, paired difference to Full, tokens a response."""
    lines = [
        "| selection | right | of Full, points (95%) | tokens a response | cut off | FF weights read |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in Result.load(path).rows:
        score = f"{row['score']:.1%} ± {100 * row['stderr']:.1f}"
        difference = ""
        if row.get("difference") is not None:
            low, high = 100 * row["difference_low"], 100 * row["difference_high"]
            difference = f"{100 * row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(
            f"| {SELECTIONS[row['variant']]} | {score} | {difference} | {row['tokens']:.0f} | {row['cut_off']:.0%} "
            f"| {row['ff_weights_read']:.1%} |"
        )
    return lines
