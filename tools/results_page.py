"""Writes docs/results.md: every table and figure of the paper, its figures beside ours, or "not measured".

    python -m tools.results_page

A test fails when the page and benchmarks/results differ. The paper's figures are those of evaluation/tasks/*.yaml
(tables 1, 2, 5) and of paper.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprese_bench.evaluation.tasks import GROUPS, Task, chosen
from caprese_bench.paper.published import CAPRESE, LORA, ROWS, SAYS, TABLE_1, TABLE_2, TABLE_3, TABLE_4
from caprese_bench.results.report import Result, Row, circumstances
from caprese_distill.config import SAMPLES
from caprese_distill.end_to_end.train import Recipe, default_learning_rate
from caprese_distill.layer_wise.adam import AdamSettings

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/results.md"
RESULTS = ROOT / "benchmarks/results"
NOT = "not measured"
INTRODUCTION = """# Results

Every table and figure of the paper ([arXiv 2505.07861](https://arxiv.org/abs/2505.07861)), its figures beside what was
measured with this code, and "not measured" where nothing was. Written by `python -m tools.results_page` from
[benchmarks/results](../benchmarks/results), which has all figures, CSV and a page with plots for each benchmark; a test
keeps it so.

The command beside an item measures it; most need a GPU, and the paper's checkpoints. What a small CPU could show was
measured on one: the same code paths, at shapes that it can hold, and a demo model of 1.2 million parameters, trained
from scratch, on which the method can be seen to work.
"""


def page() -> str:
    parts = [INTRODUCTION, _contents()]
    for item in ITEMS:
        parts.append(f"## {item.title}\n")
        parts.append("\n".join(item.write()).rstrip() + "\n")
    return "\n".join(parts)


def results(name: str) -> list[tuple[Path, Result]]:
    """All results of a benchmark, newest first."""
    found = [(path, Result.load(path)) for path in sorted(RESULTS.glob(f"*/{name}.json"))]
    return sorted(found, key=lambda pair: pair[1].provenance["time"], reverse=True)


def _contents() -> str:
    lines = ["| the paper's | command | with its models, on | with smaller ones, on |", "|---|---|---|---|"]
    gpus: set[str] = set()
    for item in ITEMS:
        found = results(item.command.split()[0]) if item.command else []
        places: dict[bool, set[str]] = {True: set(), False: set()}
        for path, result in found:
            gpus |= set(_gpus(result))
            for its in {item.its(row) for row in result.rows} - {None}:
                places[bool(its)].add(path.parent.name)
        shown = (", ".join(sorted(places[its])) or (NOT if item.command else "") for its in (True, False))
        command = f"`caprese bench {item.command}`" if item.command else ""
        lines.append(f"| {item.title} | {command} | {' | '.join(shown)} |")
    coverage = f"Measured on GPUs: {', '.join(sorted(gpus))}." if gpus else "Nothing here was measured on a GPU yet."
    return "\n".join([*lines, "", coverage]) + "\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table, its first column to the left."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def says(name: str) -> list[str]:
    return [" ".join(SAYS[name].split()), ""]


def source(path: Path, result: Result) -> list[str]:
    """Where the figures above come from."""
    provenance = result.provenance
    measured = f"Measured by `{provenance['command']}` on {circumstances(provenance)}: "
    measured += f"[{path.name}](../{path.relative_to(ROOT)})."
    note = [f"Note: {provenance['note']}.", ""] if "note" in provenance else []
    partial = ["The run was stopped before its end.", ""] if result.partial else []
    return [*note, *partial, measured, ""]


def _gpus(result: Result) -> list[str]:
    return sorted({str(gpu["name"]) for gpu in result.provenance["hardware"].get("gpus") or []})


def scores(names: str, rows: Sequence[str]) -> list[str]:
    """Tables 1, 2 and 5: "paper / ours", in percent, for each model that the paper has all these rows of."""
    tasks = chosen(names)
    ours: dict[tuple[str, str, str], Row] = {}
    sources = []
    for path, result in reversed(results("accuracy")):  # the newest last, which stays
        mine = {_key(row["task"], row["model"], row["published_row"]): row for row in result.rows}
        mine = {key: row for key, row in mine.items() if row["published_row"]}
        ours |= mine
        sources += source(path, result) if mine else []
    lines = [f"Accuracy in percent, paper / ours (problems); {NOT} where ours is a dash.", ""]
    for model in dict.fromkeys(model for task in tasks for model in task.published):
        if not all(any(row in task.published.get(model, {}) for task in tasks) for row in rows):
            continue
        cells = [
            [ROWS[row], *(_score(task, model, row, ours.get(_key(task.title, model, row))) for task in tasks)]
            for row in rows
        ]
        lines += markdown([model.rpartition("/")[2], *(task.title for task in tasks)], cells)
    return [*lines, *sources]


def _key(task: str, model: str, row: str) -> tuple[str, str, str]:
    return task, model.rpartition("/")[2], row


def _score(task: Task, model: str, row: str, mine: Row | None) -> str:
    published = task.publication(model).get(row)  # type: ignore[call-overload]
    if published is None:
        return ""
    theirs = f"{100 * published[0]:.2f}" + (f" ± {100 * published[1]:.2f}" if published[1] is not None else "")
    if mine is None:
        return f"{theirs} / -"
    spread = f" ± {100 * mine['run_std']:.2f}" if mine["run_std"] is not None else ""
    return f"{theirs} / {100 * mine['score']:.2f}{spread} ({mine['problems']:,})"


def _percent(row: Row, name: str) -> str:
    return f"{100 * row[name]:.1f} ± {100 * row[f'{name}_stderr']:.1f}"


def table_1() -> list[str]:
    lines = scores(TABLE_1, [row for row in ROWS if "lora" not in row])
    for path, result in results("accuracy"):
        rows = [row for row in result.rows if row["section"] == GROUPS["demo"]]
        if not rows:
            continue
        lines += ["The demo model's own tasks, through the same server, prompts and graders:", ""]
        cells = []
        for row in rows:
            accuracy = f"{100 * row['score']:.1f} ± {100 * row['stderr']:.1f}"
            count, read = f"{row['problems'] * row['runs']:,}", f"{row['ff_weights_read']:.1%}"
            cells.append([row["variant"], row["task"], count, accuracy, *_difference(row), read])
        header = ["", "task", "problems", "accuracy, %", "to Full, points", "95% interval", "FF weights read"]
        lines += markdown(header, cells) + source(path, result)
    return lines


def _difference(row: Row) -> tuple[str, str]:
    if row.get("difference") is None:
        return "", ""
    low, high = (f"{100 * row[f'difference_{end}']:+.1f}" for end in ("low", "high"))
    return f"{100 * row['difference']:+.1f}", f"{low} to {high}"


def table_2() -> list[str]:
    return scores(TABLE_2, [row for row in ROWS if "lora" not in row])


def table_3() -> list[str]:
    header = ["AMC 2023, E2E Caprese (GRIFFIN)", "no reselection", "every 1024", "every 256", "every 64", "Full"]
    rows = [[name, *(f"{value:.2f} / -" for value in values)] for name, values in TABLE_3.items()]
    note = "Not measured here: no such model ran. Reselection is [`reselect_interval`](serving.md#reselection)."
    return [*markdown(header, rows), note, ""]


def table_4() -> list[str]:
    names, found = list(TABLE_4["2048+256"]), results("latency")
    ours = {
        (row["setup"], row["variant"]): row
        for _, result in reversed(found)  # the newest last, which stays
        for row in result.rows
        if row["arch"] == "qwen2.5-14b" and row["section"].startswith("one request")
    }
    lines = [f"Qwen 2.5 14B, one request, bfloat16: paper (an NVIDIA L40) / ours; {NOT} where ours is a dash.", ""]
    for which, (title, key, digits) in enumerate((("end to end, s", "e2e_s", 1), ("next token, ms", "tpot_ms", 0))):
        rows = []
        for setup, published in TABLE_4.items():
            cells = [setup]
            for name in names:
                mine = ours.get((setup, name))
                cells.append(f"{published[name][which]:.{digits}f} / {f'{mine[key]:.{digits}f}' if mine else '-'}")
            rows.append(cells)
        lines += markdown([title, *names], rows)
    lines += says("latency")
    for path, result in found:
        lines += _latency(result) + source(path, result)
    return lines


def _latency(result: Result) -> list[str]:
    lines = []
    for section, rows in result.sections().items():
        weights = ", dummy weights" if rows[0]["dummy_weights"] else ""
        swept = {"distinct prompts": "batch", "samples of one prompt": "samples"}.get(
            section.partition(", ")[0], "setup"
        )
        cells = []
        for row in rows:
            times = (f"{row['e2e_s']:.2f} ± {row['e2e_iqr_s']:.2f}", f"{row['ttft_s']:.3f}")
            token = (f"{row['tpot_ms']:.2f} ± {row['tpot_iqr_ms']:.2f}", f"{row['tpot_p99_ms']:.1f}")
            ratio = (f"{row['ratio']:.3f} ± {row['ratio_iqr']:.3f}", f"{row['predicted_ratio']:.3f}")
            pace = (f"{row['gb_s']:.1f}", f"{row['bandwidth_share']:.0%}")
            cells.append([row["variant"], str(row[swept]), *times, *token, *ratio, *pace])
        header = ["", swept, "end to end, s", "first token, s", "next token, ms", "p99", "of Full", "by bytes"]
        lines += [f"**{section}{weights}**", "", *markdown([*header, "GB/s", "of bandwidth"], cells)]
    rounds = result.rows[0]["rounds"]
    return [*lines, f"Medians of {rounds} interleaved rounds, ± interquartile range; a ratio is of one round.", ""]


def table_5() -> list[str]:
    lines = scores(TABLE_1, ["full", "griffin", LORA, "end-to-end lora-griffin", *CAPRESE])
    for path, result in results("recovery"):
        lines += ["On the demo model, LoRA and Caprese of as many parameters, trained on the same samples:", ""]
        for section, rows in result.sections().items():
            cells = []
            for row in rows:
                share = "" if row["math_recovered"] is None else f"{row['math_recovered']:.0%}"
                cost = (f"{row['parameters']:,}", f"{row['seconds']:.0f}") if row["parameters"] else ("", "")
                cells.append([row["variant"], _percent(row, "math"), _percent(row, "reading"), share, *cost])
            header = [section, "math, %", "reading, %", "of the loss in math given back", "parameters", "training, s"]
            lines += markdown(header, cells)
        lines += source(path, result)
    return lines


def table_6() -> list[str]:
    adam, recipe = AdamSettings(), Recipe(learning_rate=0)
    rates = " to ".join(f"{default_learning_rate(size):.0e}" for size in (8192, 2048))
    rows = [
        ["optimizer", "Adam / closed form, or Adam with `--solver adam`", "Adam / Adam"],
        ["learning rate", f"1e-3 / {adam.lr:.0e}", f"4e-6 to 2e-4 / {rates}, by hidden size"],
        ["batch size", f"128 / {adam.batch}", f"16 / {recipe.batch}"],
        ["epochs", f"20 / {adam.epochs}", f"3 / {recipe.epochs}"],
        ["training samples", *[f"2e5 (its section 1: 20K) / at most {SAMPLES:,}"] * 2],
        ["schedule", "linear / linear", "linear / linear"],
        ["warmup", f"2% / {adam.warmup:.0%}", f"2% / {recipe.warmup:.0%}"],
    ]
    return ["Paper / the defaults of `caprese distill`.", "", *markdown(["", "layer-wise", "end-to-end"], rows)]


def figure_2() -> list[str]:
    lines = says("residual")
    for path, result in results("residual"):
        rows = [r for r in result.rows if (r["section"], r["correction"]) == ("oracle top-k of |z|", "oracle")]
        lines += [
            "Relative FF output error of generated tokens on the demo model, mean over layers, by rank r:",
            "",
        ]
        lines += _grid("density", rows, "density", "rank", lambda rank: f"r = {rank}", lambda r: f"{r['error']:.1%}")
        lines += source(path, result)
    return lines


def _grid(
    title: str,
    rows: Sequence[Row],
    down: str,
    across: str,
    name: Callable[[Any], str],
    show: Callable[[Row], str],
) -> list[str]:
    """One cell a row of the result, by two of its columns, in the order of appearance."""
    by = {(row[down], row[across]): row for row in rows}
    columns = list(dict.fromkeys(row[across] for row in rows))
    cells = [
        [str(each), *(show(by[each, column]) if (each, column) in by else "" for column in columns)]
        for each in dict.fromkeys(row[down] for row in rows)
    ]
    return markdown([title, *map(name, columns)], cells)


def figure_3() -> list[str]:
    lines = says("coverage")
    for path, result in results("coverage"):
        for section, rows in result.sections().items():
            some = [row for row in rows if row["k"] in (1, 2, 5, 10, 20, 50, 100)]
            counts = f"{rows[0]['problems']} problems, mean ± standard deviation over {rows[0]['pools']} pools"
            lines += [f"**{section}**, Pass@K in percent, {counts}:", ""]
            lines += _grid("", some, "variant", "k", lambda k: f"K = {k}", _coverage)
            active = {row["variant"]: f"{row['variant']} {row['activated']:.1%}" for row in rows}
            lines += [f"Parameters that a token needs: {', '.join(active.values())}.", ""]
        lines += source(path, result)
    return lines


def _coverage(row: Row) -> str:
    spread = "" if row["coverage_std"] is None else f" ± {100 * row['coverage_std']:.1f}"
    return f"{100 * row['coverage']:.1f}{spread}"


def lengths() -> list[str]:
    lines = says("length")
    for path, result in results("length"):
        for section, rows in result.sections().items():
            lines += [f"**{section}**, tokens of a response, by difficulty:", ""]
            lines += _grid(
                "", rows, "variant", "difficulty", str, lambda row: f"{row['tokens']:.1f} ± {row['stderr']:.1f}"
            )
        lines += source(path, result)
    return lines


def figure_5() -> list[str]:
    lines = says("ablation")
    for path, result in results("ablation"):
        full, *others = result.sections().items()
        lines += [f"The demo model's accuracy in math, Full {_percent(full[1][0], 'math')}%; r is the rank:", ""]
        for section, rows in others:
            lines += _grid(
                f"{section}, density", rows, "density", "rank", lambda rank: f"r = {rank}" if rank else "plain",
                lambda row: _percent(row, "math"),
            )  # fmt: skip
        lines += source(path, result)
    return lines


def figure_6() -> list[str]:
    lines = says("parameters")
    for path, result in results("parameters"):
        for section, rows in result.sections().items():
            header = [section, "added to the model", "to its FF blocks", "active parameters cut, GRIFFIN", "CATS"]
            cells = []
            for row in rows:
                added = (f"{row[key]:.2%}" for key in ("added_of_model", "added_of_ff"))
                cells.append([row["model"], *added, *(f"{row[key]:.1%}" for key in ("cut_griffin", "cut_cats"))])
            lines += markdown(header, cells)
        lines += source(path, result)
    return lines


@dataclass(frozen=True)
class Item:
    """A table or figure. `its`: whether a row of the result is of one of the paper's models; None: of another table."""

    title: str
    command: str
    write: Callable[[], list[str]]
    its: Callable[[Row], bool | None] = lambda row: False


def _of(group: str) -> Callable[[Row], bool | None]:
    sections = {GROUPS[group]: True, GROUPS["demo"]: False}
    return lambda row: sections.get(row["section"])


MODEL = "--model MODEL --weights ADAPTER"
ITEMS = [
    Item("Table 1: instruct models", f"accuracy --tasks table1 {MODEL}", table_1, _of("table1")),
    Item("Table 2: thinking models", f"accuracy --tasks table2 {MODEL}", table_2, _of("table2")),
    Item("Table 3: reselection", "", table_3),
    Item("Table 4: latency", "latency", table_4, lambda row: row["arch"] == "qwen2.5-14b"),
    Item("Table 5: LoRA", "recovery", table_5),
    Item("Table 6: hyperparameters", "", table_6),
    Item("Figure 2: what sparsity loses has low rank", "residual", figure_2),
    Item("Figure 3: coverage", f"coverage --tasks math500 {MODEL}", figure_3, _of("table2")),
    Item("Figures 4 and 7: length of responses", f"length --tasks math500 {MODEL}", lengths, _of("table2")),
    Item("Figure 5: rank and density", "ablation", figure_5),
    Item("Figure 6: parameters", "parameters", figure_6, lambda row: True),
]

if __name__ == "__main__":
    PAGE.write_text(page())
