"""`caprese bench length`: how long responses are, by the problem's difficulty: the paper's figures 4 and 7.

From the responses that `caprese bench accuracy` stored in the same --out; those that are not there are asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..results.plots import Plot
from ..results.recording import check_writable, recording
from ..results.report import Columns, Result, Row, table, terminal
from ..results.stats import mean, standard_error
from . import options

if TYPE_CHECKING:
    from .asking import Answers

KEYS = ["section", "model", "variant", "difficulty"]
MEASURES = ["tokens", "ratio"]
EVERY = "all"


def length(
    tasks: options.Tasks = "demo-math",
    model: options.Model = None,
    weights: options.Weights = None,
    variants: options.Variants = None,
    url: options.Url = None,
    data: options.Data = None,
    limit: options.Limit = None,
    runs: options.Runs = None,
    concurrency: options.Concurrency = 32,
    max_tokens: options.MaxTokens = None,
    seed: options.Seed = 0,
    serve_args: options.ServeArgs = "",
    quick: Annotated[bool, typer.Option("--quick", help="40 problems of each task, two runs at most.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for length.json, .csv, .html and accuracy/.")] = Path("out/bench"),
) -> None:
    """Mean tokens of a response by difficulty: figures 4 and 7, from the responses of `caprese bench accuracy`."""
    from .asking import Examiner

    check_writable(out)
    console = terminal()
    wanted, bench = options.subject(tasks, model, weights, url, serve_args, variants)
    if quick:
        limit, runs = min(limit or 40, 40), min(runs or 2, 2)
    sittings = options.sittings_of(wanted, data, limit, runs, seed, max_tokens=max_tokens)
    result = Result("length", options.origin(bench, sittings, data, seed=seed, quick=quick), KEYS, MEASURES)
    full: dict[str, dict[str, float]] = {}
    with recording(result, out, plots, None, console, COLUMNS) as record:
        for answers in Examiner(bench, out / "accuracy", True, concurrency, console).ask(sittings):
            made = rows(bench.name, answers)
            if answers.variant.method is None:
                full[answers.sitting.task.name] = {row["difficulty"]: row["tokens"] for row in made}
            to = full.get(answers.sitting.task.name)
            record.add(*(row | {"ratio": to and row["tokens"] / to[row["difficulty"]]} for row in made))
    for section, found in result.sections().items():
        console.print(table(section, found, COLUMNS))


def rows(model: str, answers: Answers) -> list[Row]:
    """A row for each difficulty, and one for all problems. Runs of a problem are averaged first."""
    sitting = answers.sitting
    each = [mean([response.tokens for response in runs]) for runs in zip(*answers.responses, strict=True)]
    groups: dict[str, list[float]] = {}
    for question, tokens in zip(sitting.exam.questions, each, strict=True):
        if question.difficulty is not None:
            groups.setdefault(question.difficulty, []).append(tokens)
    told = sitting.task.source and sitting.task.source.difficulty
    return [
        {
            "section": sitting.task.title,
            "model": model,
            "variant": answers.variant.label,
            "difficulty": EVERY if name == EVERY else f"{told} {name}",
            "problems": len(found),
            "runs": sitting.runs,
            "tokens": mean(found),
            "stderr": standard_error(found),
            "cut_off": answers.cut_off if name == EVERY else None,
        }
        for name, found in ({name: groups[name] for name in sorted(groups)} | {EVERY: each}).items()
    ]


COLUMNS: Columns = {
    "variant": ("variant", str),
    "difficulty": ("difficulty", str),
    "problems": ("problems", str),
    "runs": ("runs", str),
    "tokens": ("tokens", "{:.1f}".format),
    "±": ("stderr", "{:.1f}".format),
    "of Full": ("ratio", "{:.3f}".format),
    "cut off": ("cut_off", "{:.1%}".format),
}


def plots(result: Result) -> list[Plot]:
    return [
        Plot(section, "difficulty", "tokens", ("variant",), "", "tokens of a response, ± one standard error",
             error="stderr", kind="bar")
        for section in result.sections()
    ]  # fmt: skip
