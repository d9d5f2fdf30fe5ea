"""`caprese bench length`: how long responses are, by the problem's difficulty: the paper's figures 4 and 7.

Uses the responses that `caprese bench accuracy` stored in the same --out, and requests those that are missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from ..results.plots import Plot
from ..results.recording import check_writable, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import options_of
from ..results.stats import mean, standard_error
from .settings import EvaluationSettings, Runs, Tasks

if TYPE_CHECKING:
    from .runs import Answers

KEYS = ["section", "model", "variant", "difficulty"]
MEASURES = ["tokens", "ratio"]
EVERY = "all"


@dataclass(frozen=True, kw_only=True)
class LengthSettings(EvaluationSettings):
    """Options of `caprese bench length`."""

    tasks: Tasks = "demo-math"
    runs: Runs = None
    quick: Annotated[bool, typer.Option("--quick", help="40 problems of each task, two runs at most.")] = False


@options_of(LengthSettings)
def length(settings: LengthSettings) -> None:
    """Mean tokens of a response by difficulty: figures 4 and 7, from the responses of `caprese bench accuracy`."""
    from .collecting import ResponseCollector

    check_writable(settings.out)
    if settings.quick:
        settings = replace(settings, limit=min(settings.limit or 40, 40), runs=min(settings.runs or 2, 2))
    model = settings.served_model()
    runs = settings.evaluation_runs(settings.runs)
    result = Result("length", settings.provenance(model, runs, settings.quick), KEYS, MEASURES)
    collector = ResponseCollector(model, settings.out / "accuracy", True, settings.concurrency)
    full: dict[str, dict[str, float]] = {}
    with recording(result, settings.out, plots, None, COLUMNS) as record:
        for answers in collector.collect(runs):
            measured = rows(model.name, answers)
            if answers.variant.method is None:
                full[answers.run.task.name] = {row["difficulty"]: row["tokens"] for row in measured}
            of_full = full.get(answers.run.task.name)
            record.add(*(row | {"ratio": of_full and row["tokens"] / of_full[row["difficulty"]]} for row in measured))
    show(result, COLUMNS, settings.as_json)


def rows(model: str, answers: Answers) -> list[Row]:
    """A row for each difficulty, and one for all problems. The repeats of a problem are averaged first."""
    run = answers.run
    by_problem = [mean([response.tokens for response in repeats]) for repeats in zip(*answers.responses, strict=True)]
    groups: dict[str, list[float]] = {}
    for question, tokens in zip(run.problems.questions, by_problem, strict=True):
        if question.difficulty is not None:
            groups.setdefault(question.difficulty, []).append(tokens)
    column = run.task.source and run.task.source.difficulty
    return [
        {
            "section": run.task.title,
            "model": model,
            "variant": answers.variant.label,
            "difficulty": EVERY if name == EVERY else f"{column} {name}",
            "problems": len(tokens),
            "runs": run.repeats,
            "tokens": mean(tokens),
            "stderr": standard_error(tokens),
            "cut_off": answers.cut_off if name == EVERY else None,
        }
        for name, tokens in ({name: groups[name] for name in sorted(groups)} | {EVERY: by_problem}).items()
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
    """Tokens of a response by difficulty, as bars."""
    return [
        Plot(section, "difficulty", "tokens", ("variant",), "", "tokens of a response, ± one standard error",
             error="stderr", kind="bar")
        for section in result.sections()
    ]  # fmt: skip
