"""Writes the README's tables of results from the measured JSON, so that no figure there is typed by hand.

    python tools/readme.py

A test fails when README and results differ.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from caprese_bench.results.report import Result, circumstances
from caprese_serve.demo.results import DemoReport, remarks

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"
SHAPES = {
    "llama-3.1-8b": "Llama 3.1 8B",
    "qwen-2.5-1.5b": "Qwen 2.5 1.5B",
    "qwen-2.5-7b": "Qwen 2.5 7B",
    "qwen-2.5-14b": "Qwen 2.5 14B",
    "gemma-2-9b": "Gemma 2 9B",
}


def newest(name: str) -> Path:
    """The file of a benchmark's latest result, whatever it was measured on."""
    return max(RESULTS.glob(f"*/{name}.json"), key=lambda path: json.loads(path.read_text())["provenance"]["time"])


def demo(path: Path) -> str:
    """The table, what it says in words, and where it comes from, in Markdown."""
    report = DemoReport.model_validate_json(path.read_text())
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
    lines += _note(report.provenance)
    lines.append(f"- Measured by `{report.provenance['command']}` on {_source(path, report.provenance)}")
    return "\n".join(lines) + "\n"


def recovery(path: Path) -> str:
    """For each method: accuracies with one standard error, parameters added, training time, errors of eq. 7 and 8."""
    result = Result.load(path)
    lines = []
    for section, rows in result.sections().items():
        lines += [
            f"| {section} | math | reading | of the loss in math | parameters | training, s | eq. 7 | eq. 8 |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            tasks = (f"{row[task]:.1%} ± {100 * row[f'{task}_stderr']:.1f}" for task in ("math", "reading"))
            share = row["math_recovered"]
            given = "" if share is None else f"{share:.0%} ± {100 * row['math_recovered_stderr']:.0f}"
            errors = (f"{row[key]:.1%}" if row[key] else "" for key in ("ff_error", "hidden_error"))
            cost = (f"{row['parameters']:,}", f"{row['seconds']:.0f}") if row["parameters"] else ("", "")
            lines.append(f"| {' | '.join((row['variant'], *tasks, given, *cost, *errors))} |")
        lines.append("")
    settings = result.provenance["settings"]
    lines += [
        f"- {rows[0]['problems']:,} held-out problems of each task, greedy; ± is one standard error, shares' by paired "
        f"differences. All trained on the same {settings['samples']:,} problems, a tenth of them held out for the "
        "errors, of the FF blocks (eq. 7) and of the last hidden state (eq. 8).",
        "- Epochs, batches and schedules are the paper's; learning rates were chosen for this small model on training "
        "problems. End to end counts the layer-wise stage's time as well.",
        *_note(result.provenance),
        f"- Measured by `{result.provenance['command']}` on {_source(path, result.provenance)}",
    ]
    return "\n".join(lines) + "\n"


def kernels(path: Path) -> str:
    """One token at density .5, with a low-rank layer of rank 256, for each shape; then what larger batches take."""
    result = Result.load(path)
    lines = [
        "| FF block of | dense, ms | GRIFFIN | CATS | GRIFFIN reads at |",
        "|---|---:|---:|---:|---:|",
    ]
    rows = result.sections()
    for shape, name in SHAPES.items():
        here = {(row["method"], row.get("rank")): row for row in rows["shapes"] if row["shape"] == shape}
        dense = next(row for (method, _), row in here.items() if method == "dense")
        griffin, cats = here["griffin", 256], here["cats", 256]
        lines.append(
            f"| {name} ({dense['hidden_size']} x {dense['neurons']}) "
            f"| {dense['time_us'] / 1e3:.2f} ({dense['kernel']}) "
            f"| {griffin['ratio']:.2f}x | {cats['ratio']:.2f}x "
            f"| {griffin['gb_s']:.0f} of {griffin['bandwidth_gb_s']:.0f} GB/s |"
        )
    batch = [row for row in rows["batch"] if row["method"] != "dense"]
    lines += ["", f"And for more tokens at once ({SHAPES[batch[0]['shape']]}), as times of dense:", ""]
    sizes = sorted({row["tokens"] for row in batch})
    lines += [f"| tokens | {' | '.join(map(str, sizes))} |", "|---|" + "---:|" * len(sizes)]
    for method, selection, told in (
        ("griffin", "independent", "GRIFFIN, every token its own selection"),
        ("griffin", "shared", "GRIFFIN, one selection (samples of one prompt)"),
        ("cats", None, "CATS"),
    ):
        of = {r["tokens"]: r for r in batch if r["method"] == method and selection in (None, r["selection"])}
        lines.append(f"| {told} | " + " | ".join(f"{of[size]['ratio']:.2f}" for size in sizes) + " |")
    settings = result.provenance["settings"]
    lines += [
        "",
        f"- bfloat16, {settings['threads']} threads, medians of interleaved samples; dense is the fastest of vLLM's "
        "own oneDNN path, torch's linear and torch.compile in the same run; weights rotate through four times the "
        "last-level cache. Beside GB/s stands the pace of a plain read by all threads, measured among the samples; "
        "this machine is shared, and drifts.",
        f"- Measured by `{result.provenance['command']}` on {_source(path, result.provenance)}",
    ]
    return "\n".join(lines) + "\n"


def latency(path: Path) -> str:
    """Time to next token of each model in its longest setup, of Full in ms and of the others as shares of it."""
    result = Result.load(path)
    rows = [row for row in result.rows if row["section"].startswith("one request")]
    variants = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != "Full"]
    lines = [f"| | setup | Full, ms | {' | '.join(variants)} |", "|---|---:|---:|" + "---:|" * len(variants)]
    for arch in dict.fromkeys(row["arch"] for row in rows):
        here = {row["setup"]: row["full_tpot_ms"] for row in rows if row["arch"] == arch}
        setup = max(here, key=lambda text: sum(map(int, text.split("+"))))
        of = {row["variant"]: row for row in rows if (row["arch"], row["setup"]) == (arch, setup)}
        cells = (
            f"{of[name]['ratio']:.3f} ({of[name]['predicted_ratio']:.3f})" if name in of else "" for name in variants
        )
        lines.append(f"| {arch} | {setup} | {of['Full']['tpot_ms']:.1f} | {' | '.join(cells)} |")
    settings = result.provenance["settings"]
    lines += [
        "",
        "- Time to next token of one request through vLLM, compiled, as a share of Full's in the same round: medians "
        f"of {rows[0]['rounds']} interleaved rounds. In brackets what the bytes that a token needs predict. Weights "
        f"are random; density {settings['density']:g}, rank {settings['rank']}, LoRA of as many parameters. A setup is "
        "prompt + generated tokens.",
        *_note(result.provenance),
        f"- Measured by `{result.provenance['command']}` on {_source(path, result.provenance)}",
    ]
    return "\n".join(lines) + "\n"


def _note(provenance: dict[str, Any]) -> list[str]:
    """What whoever measured wrote beside the figures."""
    return [f"- Note: {provenance['note']}."] if "note" in provenance else []


def _source(path: Path, provenance: dict[str, Any]) -> str:
    here = path.relative_to(ROOT)
    return f"{circumstances(provenance)}; all figures: [{here}]({here})."


def render(readme: str) -> str:
    """README with its tables written anew."""
    tables = {
        "demo": demo(newest("demo")),
        "recovery": recovery(newest("recovery")),
        "kernels": kernels(newest("kernels")),
        "latency": latency(newest("latency")),
    }
    for name, text in tables.items():
        place = re.compile(rf"(<!-- {name}: written by tools/readme.py -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        found = place.search(readme)
        if not found:
            raise ValueError(f"{README} has no place for the table {name!r}")
        readme = readme[: found.start()] + found[1] + text + found[2] + readme[found.end() :]
    return readme


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
