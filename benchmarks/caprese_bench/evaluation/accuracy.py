"""`caprese bench accuracy`: the paper's tables 1 and 2 against a served model, and the same on the demo's tasks.

Full, GRIFFIN, CATS and Caprese answer the same prompts through the same server, client and grader; Full is the Caprese
server asked with `vllm_xargs: {"caprese": "off"}`. A row needs proof: the server's counters must show that the variant
generated sparse, and Full dense (evaluation/asking.py). Differences to Full are paired by problem.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..results.plots import Plot
from ..results.recording import check_writable, recording
from ..results.report import Columns, Result, Row, table, terminal
from ..results.stats import mcnemar, mean, paired_interval, sample_deviation, standard_error
from . import options
from .tasks import GROUPS

if TYPE_CHECKING:
    from .asking import Answers

KEYS = ["section", "task", "model", "variant"]
MEASURES = ["score", "tokens", "difference"]


def accuracy(
    tasks: options.Tasks = "demo",
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
    resume: options.Resume = False,
    out: Annotated[Path, typer.Option(help="Folder for accuracy.json, .csv, .html and accuracy/.")] = Path("out/bench"),
) -> None:
    """Accuracy of Full, GRIFFIN, CATS and Caprese through vLLM: tables 1 and 2, with paired differences to Full."""
    import scipy.stats  # noqa: F401 - if it is missing, that is told before the questions are asked

    from .asking import Examiner

    check_writable(out)
    console = terminal()
    wanted, bench = options.subject(tasks, model, weights, url, serve_args, variants)
    if quick:
        limit, runs = min(limit or 40, 40), min(runs or 2, 2)
    sittings = options.sittings_of(wanted, data, limit, runs, seed, max_tokens=max_tokens)
    result = Result("accuracy", options.origin(bench, sittings, data, seed=seed, quick=quick), KEYS, MEASURES)
    full: dict[str, list[list[float]]] = {}
    # Rows are made anew from stored responses, so that recording has none to take over.
    with recording(result, out, plots, False, console, COLUMNS) as record:
        for answers in Examiner(bench, out / "accuracy", resume, concurrency, console).ask(sittings):
            scores = answers.scores()
            if answers.variant.method is None:
                full[answers.sitting.task.name] = scores
            record.add(row(bench.name, answers, scores, full.get(answers.sitting.task.name)))
        titles = [task.title for task in wanted]
        result.rows.sort(key=lambda row: titles.index(row["task"]))  # variants of a task one below another
    for section, rows in result.sections().items():
        console.print(table(section, rows, COLUMNS))


def row(model: str, answers: Answers, scores: list[list[float]], full: list[list[float]] | None) -> Row:
    """One variant's scores on a task, by run and question. A problem's runs are averaged before problems are paired."""
    task, variant = answers.sitting.task, answers.variant
    each = [mean(runs) for runs in zip(*scores, strict=True)]
    sparse, read = answers.counted()
    published = task.publication(model)
    mine, theirs = published.get(variant.published), published.get("full")  # type: ignore[call-overload]
    made: Row = {
        "section": GROUPS[task.group],
        "task": task.title,
        "model": model,
        "variant": variant.label,
        "metric": answers.sitting.exam.metric,
        "problems": len(each),
        "runs": len(scores),
        "score": mean(each),
        "stderr": standard_error(each),
        "run_std": sample_deviation([mean(run) for run in scores]),
        "tokens": answers.mean_tokens,
        "cut_off": answers.cut_off,
        "sparse_tokens": sparse,
        "ff_weights_read": 1.0 if variant.method is None else read,
        "published_row": variant.published if mine else None,
        "published": mine and mine[0],
        "published_std": mine and mine[1],
        "published_difference": mine and theirs and mine[0] - theirs[0],
    }
    if full is None or variant.method is None:
        return made
    theirs_each = [mean(runs) for runs in zip(*full, strict=True)]
    difference, low, high = paired_interval(each, theirs_each)
    made |= {"difference": difference, "difference_low": low, "difference_high": high}
    if len(scores) == 1 and {*each, *theirs_each} <= {0.0, 1.0}:
        won, lost, p = mcnemar(each, theirs_each)
        made |= {"won": won, "lost": lost, "mcnemar_p": p}
    return made


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


COLUMNS: Columns = {
    "task": ("task", str),
    "variant": ("variant", str),
    "problems": ("problems", str),
    "runs": ("runs", str),
    "score, %": ("score", _percent),
    "± error": ("stderr", _percent),
    "± runs": ("run_std", _percent),
    "to Full": ("difference", _points),
    "95% from": ("difference_low", _points),
    "to": ("difference_high", _points),
    "won": ("won", str),
    "lost": ("lost", str),
    "p": ("mcnemar_p", "{:.2g}".format),
    "tokens": ("tokens", "{:.1f}".format),
    "cut off": ("cut_off", "{:.1%}".format),
    "FF weights read": ("ff_weights_read", "{:.1%}".format),
    "paper": ("published", _percent),
    "paper, to Full": ("published_difference", _points),
}


def plots(result: Result) -> list[Plot]:
    """Each table as bars, and the paper's beside it where it has the model."""
    made = []
    for section, rows in result.sections().items():
        made.append(
            Plot(section, "task", "score", ("variant",), "", "score, ± one standard error", error="stderr", kind="bar",
                 percent=True, show=_percent)
        )  # fmt: skip
        if any(each["published"] is not None for each in rows):
            made.append(
                Plot(section, "task", "published", ("variant",), "", "published, ± deviation of runs",
                     error="published_std", kind="bar", percent=True, show=_percent)
            )  # fmt: skip
    return made
