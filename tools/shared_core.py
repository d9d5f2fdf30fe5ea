"""What docs/performance.md shows of a shared core on a real model: times by number of requests."""

from __future__ import annotations

from pathlib import Path

from caprese_bench.results.report import Result

NAMES = {
    "prior-half": "core 1, first half of the layers",
    "prior-all": "core 1, all layers",
    "prior-all-tail": "core 0.8, all layers",
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
