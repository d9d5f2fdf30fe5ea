"""Writes the README's table of results from the measured JSON, so that no figure there is typed by hand.

    python benchmarks/readme.py

A test fails when README and results differ.
"""

from __future__ import annotations

import re
from pathlib import Path

from caprese_serve.demo.results import DemoReport, remarks

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results/cpu/demo.json"
PLACE = re.compile(r"(<!-- demo: written by benchmarks/readme.py -->\n).*?(<!-- end of demo -->)", re.DOTALL)


def section(report: DemoReport) -> str:
    """The table, what it says in words, and where it comes from, in Markdown."""
    lines = [
        "| | math | reading | tokens a response | tokens/s | FF weights read |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.variant} | {row.math} | {row.reading} | {row.mean_tokens:.1f} | {row.tokens_per_s:.0f} "
        f"| {row.ff_weights_read:.1%} |"
        for row in report.rows
    ]
    lines += ["", *(f"- {remark}" for remark in remarks(report))]
    source = report.provenance
    cpu, versions, commit = source["hardware"]["cpu"], source["versions"], str(source["git_commit"])[:12]
    lines.append(
        f"- Measured by `{source['command']}` on {cpu['model']} ({cpu['cores']} cores, no GPU), "
        f"{source['time'][:10]}, vLLM {versions['vllm']}, torch {versions['torch']}, commit {commit}; "
        f"all figures: [{RESULTS.relative_to(ROOT)}]({RESULTS.relative_to(ROOT)})."
    )
    return "\n".join(lines) + "\n"


def render(readme: str, report: DemoReport) -> str:
    """README with the section replaced."""
    if not PLACE.search(readme):
        raise ValueError(f"{README} has no place for the demo's table")
    return PLACE.sub(lambda found: found[1] + section(report) + found[2], readme)


def load() -> DemoReport:
    return DemoReport.model_validate_json(RESULTS.read_text())


if __name__ == "__main__":
    README.write_text(render(README.read_text(), load()))
