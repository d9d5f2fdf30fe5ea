"""`caprese bench accuracy`: the paper's tables 1 and 2 through a served model, and the same on the demo's tasks.

Full, GRIFFIN, CATS and Caprese answer the same prompts through the same server, client and grader; Full is the Caprese
server with the request option `vllm_xargs: {"caprese": "off"}`. A row needs proof by the server's counters that the
variant generated its tokens sparsely, and Full densely (counters.py). Differences to Full are paired by problem.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from ..results.plots import Plot
from ..results.recording import check_writable, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import options_of
from ..results.stats import mcnemar, mean, paired_interval, sample_deviation, standard_error
from .settings import EvaluationSettings, Resume, Runs, Tasks
from .tasks import GROUPS

if TYPE_CHECKING:
    from .runs import Answers

KEYS = ["section", "task", "model", "variant"]
MEASURES = ["score", "tokens", "difference"]


@dataclass(frozen=True, kw_only=True)
class AccuracySettings(EvaluationSettings):
    """Options of `caprese bench accuracy`."""

    tasks: Tasks = "demo"
    runs: Runs = None
    quick: Annotated[bool, typer.Option("--quick", help="40 problems of each task, two runs at most.")] = False
    resume: Resume = False


@options_of(AccuracySettings)
def accuracy(settings: AccuracySettings) -> None:
    """Accuracy of Full, GRIFFIN, CATS and Caprese through vLLM: tables 1 and 2, with paired differences to Full."""
    import scipy.stats  # noqa: F401 - fails here if it is not installed, before any question is asked

    from .collecting import ResponseCollector

    check_writable(settings.out)
    if settings.quick:
        settings = replace(settings, limit=min(settings.limit or 40, 40), runs=min(settings.runs or 2, 2))
    model = settings.served_model()
    runs = settings.evaluation_runs(settings.runs)
    result = Result("accuracy", settings.provenance(model, runs, settings.quick), KEYS, MEASURES)
    collector = ResponseCollector(model, settings.out / "accuracy", settings.resume, settings.concurrency)
    full: dict[str, list[list[float]]] = {}
    # Rows are computed again from the stored responses, so the recording has none to keep.
    with recording(result, settings.out, plots, False, COLUMNS) as record:
        for answers in collector.collect(runs):
            scores = answers.scores()
            if answers.variant.method is None:
                full[answers.run.task.name] = scores
            record.add(row(model.name, answers, scores, full.get(answers.run.task.name)))
        titles = [run.task.title for run in runs]
        result.rows.sort(key=lambda row: titles.index(row["task"]))  # a task's variants one below another
    show(result, COLUMNS, settings.as_json)


def row(model: str, answers: Answers, scores: list[list[float]], full: list[list[float]] | None) -> Row:
    """The row of a variant's scores on a task; `scores` and Full's are by repeat and question.

    The repeats of a problem are averaged before problems are paired.
    """
    task, variant = answers.run.task, answers.variant
    by_problem = [mean(repeats) for repeats in zip(*scores, strict=True)]
    sparse, read = answers.counted()
    published = task.publication(model)
    paper, paper_full = published.get(variant.published), published.get("full")  # type: ignore[call-overload]
    columns: Row = {
        "section": GROUPS[task.group],
        "task": task.title,
        "model": model,
        "variant": variant.label,
        "metric": answers.run.problems.metric,
        "problems": len(by_problem),
        "runs": len(scores),
        "score": mean(by_problem),
        "stderr": standard_error(by_problem),
        "run_std": sample_deviation([mean(repeat) for repeat in scores]),
        "tokens": answers.mean_tokens,
        "cut_off": answers.cut_off,
        "sparse_tokens": sparse,
        "ff_weights_read": 1.0 if variant.method is None else read,
        "published_row": variant.published if paper else None,
        "published": paper and paper[0],
        "published_std": paper and paper[1],
        "published_difference": paper and paper_full and paper[0] - paper_full[0],
    }
    if full is None or variant.method is None:
        return columns
    full_by_problem = [mean(repeats) for repeats in zip(*full, strict=True)]
    difference, low, high = paired_interval(by_problem, full_by_problem)
    columns |= {"difference": difference, "difference_low": low, "difference_high": high}
    if len(scores) == 1 and {*by_problem, *full_by_problem} <= {0.0, 1.0}:
        won, lost, p = mcnemar(by_problem, full_by_problem)
        columns |= {"won": won, "lost": lost, "mcnemar_p": p}
    return columns


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
    """Each table as bars, and beside it the paper's if it has the model."""
    drawn = []
    for section, rows in result.sections().items():
        drawn.append(
            Plot(section, "task", "score", ("variant",), "", "score, ± one standard error", error="stderr", kind="bar",
                 percent=True, show=_percent)
        )  # fmt: skip
        if any(each["published"] is not None for each in rows):
            drawn.append(
                Plot(section, "task", "published", ("variant",), "", "published, ± deviation of runs",
                     error="published_std", kind="bar", percent=True, show=_percent)
            )  # fmt: skip
    return drawn
