"""Writes what README.md and docs/ show of the measured results: tables, the picture, and the package index's page.

    python -m tools.readme

No figure there is typed by hand; a test fails when a page and benchmarks/results differ. docs/results.md is written by
tools/results_page.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprese_bench.results.report import Result, Row, circumstances
from caprese_serve.demo.results import DemoReport, remarks

from . import picture, shared_core

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PICTURE = DOCS / "accuracy-and-time.svg"
INDEX_PAGE = DOCS / "package-index.md"
SHARED_CORE = ROOT / "benchmarks/results/amd-epyc/shared-core/latency.json"
REAL_ACCURACY = ROOT / "benchmarks/results/intel-xeon/shared-core/accuracy.json"
REAL_LATENCY = ROOT / "benchmarks/results/intel-xeon/shared-core/latency.json"
RESULTS = ROOT / "benchmarks/results"
DEMO_TASKS = {"word problems": "math", "reading questions": "reading"}  # titles in accuracy.json: our columns
SMALL, LARGE = "qwen2.5-0.5b", "qwen2.5-1.5b"  # models of latency.json that the README shows
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
    lines.append(f"- Measured by `{report.provenance['command']}` on {source(path, report.provenance)}")
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
        f"- Measured by `{result.provenance['command']}` on {source(path, result.provenance)}",
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
        measured = {(row["method"], row.get("rank")): row for row in rows["shapes"] if row["shape"] == shape}
        dense = next(row for (method, _), row in measured.items() if method == "dense")
        griffin, cats = measured["griffin", 256], measured["cats", 256]
        lines.append(
            f"| {name} ({dense['hidden_size']} x {dense['neurons']}) "
            f"| {dense['time_us'] / 1e3:.2f} ({dense['kernel']}) "
            f"| {griffin['ratio']:.2f}x | {cats['ratio']:.2f}x "
            f"| {griffin['gb_s']:.0f} of {griffin['bandwidth_gb_s']:.0f} GB/s |"
        )
    batch = [row for row in rows["batch"] if row["method"] != "dense"]
    lines += ["", f"Several tokens at once ({SHAPES[batch[0]['shape']]}), as a share of dense's time:", ""]
    sizes = sorted({row["tokens"] for row in batch})
    lines += [f"| tokens | {' | '.join(map(str, sizes))} |", "|---|" + "---:|" * len(sizes)]
    for method, selection, title in (
        ("griffin", "independent", "GRIFFIN, every token its own selection"),
        ("griffin", "shared", "GRIFFIN, one selection (samples of one prompt)"),
        ("cats", None, "CATS"),
    ):
        of = {r["tokens"]: r for r in batch if r["method"] == method and selection in (None, r["selection"])}
        lines.append(f"| {title} | " + " | ".join(f"{of[size]['ratio']:.2f}" for size in sizes) + " |")
    settings = result.provenance["settings"]
    lines += [
        "",
        f"- bfloat16, {settings['threads']} threads, medians of interleaved samples; dense is the fastest of vLLM's "
        "own oneDNN path, torch's linear and torch.compile in the same run; weights rotate through four times the "
        "last-level cache. The second GB/s is a plain read by all threads, measured between the samples; the machine "
        "is shared, and its speed drifts.",
        f"- Measured by `{result.provenance['command']}` on {source(path, result.provenance)}",
    ]
    return "\n".join(lines) + "\n"


def latency(path: Path) -> str:
    """Time to next token of each model in its longest setup, of Full in ms and of the others as shares of it."""
    result = Result.load(path)
    rows = [row for row in result.rows if row["section"].startswith("one request")]
    variants = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != "Full"]
    lines = [f"| | setup | Full, ms | {' | '.join(variants)} |", "|---|---:|---:|" + "---:|" * len(variants)]
    for arch in dict.fromkeys(row["arch"] for row in rows):
        setup = _longest_setup(rows, arch)
        of = {row["variant"]: row for row in rows if (row["arch"], row["setup"]) == (arch, setup)}
        cells = (
            f"{of[name]['ratio']:.3f} ({of[name]['predicted_ratio']:.3f})" if name in of else "" for name in variants
        )
        lines.append(f"| {arch} | {setup} | {of['Full']['tpot_ms']:.1f} | {' | '.join(cells)} |")
    settings = result.provenance["settings"]
    lines += [
        "",
        "- Time to next token of one request through vLLM, compiled, as a share of Full's in the same round: medians "
        f"of {rows[0]['rounds']} interleaved rounds. In brackets: the share that the bytes a token needs predict. "
        f"Weights are random; density {settings['density']:g}, rank {settings['rank']}, LoRA of as many parameters. "
        "A setup is prompt + generated tokens.",
        *_note(result.provenance),
        f"- Measured by `{result.provenance['command']}` on {source(path, result.provenance)}",
    ]
    return "\n".join(lines) + "\n"


def core(path: Path) -> str:
    """The times of `shared_core`, and where they come from, in Markdown."""
    return _measured(shared_core.table(path), path)


def real_accuracy(path: Path) -> str:
    """The accuracies of `shared_core`, and where they come from, in Markdown."""
    return _measured(shared_core.accuracies(path), path)


def real(path: Path) -> str:
    """The accuracies alone, for the README."""
    machine = _machine(Result.load(path).provenance)
    where = "[docs/performance.md](docs/performance.md#its-accuracy)"
    return "\n".join([*shared_core.accuracies(path), "", f"Measured on {machine}: {where}."]) + "\n"


def _measured(lines: list[str], path: Path) -> str:
    provenance = Result.load(path).provenance
    measured = f"- Measured by `{provenance['command']}` on {source(path, provenance)}"
    return "\n".join([*lines, "", *_note(provenance), measured]) + "\n"


def _note(provenance: dict[str, Any]) -> list[str]:
    """The remark stored with the figures, if there is one."""
    return [f"- Note: {provenance['note']}."] if "note" in provenance else []


def source(path: Path, provenance: dict[str, Any]) -> str:
    """Hardware, date, versions and commit, and a link to the file from a page in docs/."""
    name = path.relative_to(ROOT)
    return f"{circumstances(provenance)}; all figures: [{name}](../{name})."


def _longest_setup(rows: Sequence[Row], arch: str) -> str:
    setups = {row["setup"] for row in rows if row["arch"] == arch}
    return max(setups, key=lambda setup: sum(map(int, setup.split("+"))))


@dataclass(frozen=True)
class Summary:
    """What the README shows: accuracies of the demo model, times to the next token of models with random weights."""

    accuracy_file: Path
    accuracy: Result
    latency_file: Path
    latency: Result

    @classmethod
    def load(cls) -> Summary:
        accuracy_file, latency_file = newest("accuracy"), newest("latency")
        return cls(accuracy_file, Result.load(accuracy_file), latency_file, Result.load(latency_file))

    def score(self, variant: str, task: str) -> Row:
        return next(row for row in self.accuracy.rows if (row["variant"], row["task"]) == (variant, task))

    def time(self, variant: str, arch: str) -> Row | None:
        """One request in the model's longest setup; None where the variant was not measured."""
        rows = [row for row in self.latency.rows if row["section"] == f"one request, {arch}"]
        setup = _longest_setup(rows, arch)
        return next((row for row in rows if (row["variant"], row["setup"]) == (variant, setup)), None)

    def demo_density(self, method: str) -> str:
        return f"{self.accuracy.provenance['settings']['variants'][method]['density']:g}"


def summary(shown: Summary) -> str:
    """The README's one table, and where its figures come from."""
    lines = [
        "| | math, demo model | reading, demo model | next token, 0.5B | next token, 1.5B |",
        "|---|---:|---:|---:|---:|",
    ]
    for variant in picture.VARIANTS:
        scores = (shown.score(variant, task) for task in DEMO_TASKS)
        cells = [f"{row['score']:.1%} ± {100 * row['stderr']:.1f}" for row in scores]
        for row in (shown.time(variant, arch) for arch in (SMALL, LARGE)):
            if row is None:
                cells.append("not measured")
            else:
                cells.append(f"{row['tpot_ms']:.1f} ms" + (f", {row['ratio']:.2f}x" if variant != "Full" else ""))
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    files = ", ".join(f"[{path.name}]({path.relative_to(ROOT)})" for path in (shown.accuracy_file, shown.latency_file))
    problems = shown.score("Full", next(iter(DEMO_TASKS)))["problems"]
    settings, time = shown.latency.provenance["settings"], shown.time("Full", SMALL)
    assert time is not None
    lines += [
        "",
        f"*Accuracy*: a demo model of 1.2 million parameters, {problems} held-out problems a task, ± one standard "
        f"error; density {shown.demo_density('griffin')} (GRIFFIN), {shown.demo_density('cats')} (CATS). *Time*: one "
        f"request, Qwen 2.5's shapes with random weights, density {settings['density']:g}, rank {settings['rank']}; "
        f'"x" is the share of Full\'s time, the median of {time["rounds"]} rounds. Measured on '
        f"{circumstances(shown.accuracy.provenance)} (accuracy), {circumstances(shown.latency.provenance)} (time): "
        f"{files}.",
    ]
    return "\n".join(lines) + "\n"


def draw(shown: Summary) -> str:
    """The README's picture, as SVG."""
    scores = [shown.score(variant, "word problems") for variant in picture.VARIANTS]
    times = [shown.time(variant, SMALL) for variant in picture.VARIANTS]
    measured = [row for row in times if row is not None]
    if len(measured) != len(picture.VARIANTS):
        raise ValueError(f"{shown.latency_file}: a variant of {picture.VARIANTS} was not measured with {SMALL}")
    return picture.draw(
        (
            picture.Panel(
                title="Word problems solved",
                subtitle=f"a demo model of 1.2M parameters, {scores[0]['problems']} held-out problems\n"
                f"density {shown.demo_density('griffin')} (GRIFFIN), {shown.demo_density('cats')} (CATS)",
                values=tuple(100 * row["score"] for row in scores),
                errors=tuple(100 * row["stderr"] for row in scores),
                labels=tuple(f"{row['score']:.1%}" for row in scores),
                limit=125,
            ),
            picture.Panel(
                title="Time to the next token",
                subtitle="another model: Qwen 2.5 0.5B's shape, random weights\n"
                f"one request, density {shown.latency.provenance['settings']['density']:g}",
                values=tuple(row["tpot_ms"] for row in measured),
                errors=tuple(row["tpot_iqr_ms"] / 2 for row in measured),
                labels=tuple(
                    f"{row['tpot_ms']:.1f} ms" + ("" if row["variant"] == "Full" else f"  ({row['ratio'] - 1:+.1%})")
                    for row in measured
                ),
                limit=1.42 * max(row["tpot_ms"] for row in measured),
            ),
        ),
        f"{_machine(shown.latency.provenance)}. {shown.accuracy_file.relative_to(ROOT)}, "
        f"{shown.latency_file.relative_to(ROOT)}",
    )


def _machine(provenance: dict[str, Any]) -> str:
    """Hardware and date, without versions."""
    return circumstances(provenance).split(", vllm")[0]


def fill(text: str, tables: Mapping[str, str], page: Path) -> str:
    """The page's text with its tables written anew."""
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {name}: written by tools/readme.py -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        found = place.search(text)
        if not found:
            raise ValueError(f"{page} has no place for the table {name!r}")
        text = text[: found.start()] + found[1] + table + found[2] + text[found.end() :]
    return text


def index_page(readme: str) -> str:
    """The README as a package index shows it: no picture, and links into the repository become plain paths."""
    text = re.sub(r"<!-- picture -->\n.*?<!-- end of picture -->\n\n", "", readme, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?://|#)([^)]*)\)", _plain_path, text)


def _plain_path(link: re.Match[str]) -> str:
    text, target = link[1], link[2].partition("#")[0]
    return f"`{target}`" if text.strip("`") in target else f"{text} (`{target}`)"


def pages() -> dict[Path, str]:
    """Every file that this module writes, by path."""
    shown = Summary.load()
    tables = {
        README: {"real": real(REAL_ACCURACY), "summary": summary(shown)},
        DOCS / "demo.md": {"demo": demo(newest("demo"))},
        DOCS / "recovery.md": {"recovery": recovery(newest("recovery"))},
        DOCS / "performance.md": {
            "kernels": kernels(newest("kernels")),
            "latency": latency(newest("latency")),
            "core": core(SHARED_CORE),
            "core-bfloat16": core(REAL_LATENCY),
            "real-accuracy": real_accuracy(REAL_ACCURACY),
        },
    }
    written = {page: fill(page.read_text(), contents, page) for page, contents in tables.items()}
    return written | {PICTURE: draw(shown), INDEX_PAGE: index_page(written[README])}


def main() -> None:
    for page, text in pages().items():
        page.write_text(text)


if __name__ == "__main__":
    main()
