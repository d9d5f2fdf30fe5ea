"""`caprese bench coverage`: Pass@K of Full, GRIFFIN, CATS and Caprese over K, the paper's figure 3.

Every problem has ten pools of 100 samples. The coverage of a pool is the mean over problems of the unbiased Pass@K; the
benchmark reports its mean and standard deviation over pools. Compute is K x A in relative units, where A is the share
of parameters that a generated token needs (`caprese bench parameters`). A problem's samples in a pool are one request,
so they share a selection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from caprese_kernels.errors import CapreseError

from ..paper.counts import ParameterCount, count, spared_share
from ..paper.families import model_config
from ..results.plots import Plot
from ..results.recording import check_writable, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import options_of
from ..results.stats import mean, pass_at_k, sample_deviation
from .settings import Concurrency, EvaluationSettings, Limit, Resume, Tasks
from .tasks import chosen

if TYPE_CHECKING:
    from .runs import Answers, EvaluationRun
    from .tasks import Task
    from .variants import ServedVariant

KEYS = ["section", "model", "variant", "k"]
MEASURES = ["coverage", "compute"]
PROBLEMS = 140  # as in the paper
TEMPERATURE, TOP_P = 0.6, 0.95  # for tasks that are otherwise greedy
SHOWN = (1, 2, 5, 10, 20, 50, 100)  # the K in the terminal's table


@dataclass(frozen=True, kw_only=True)
class CoverageSettings(EvaluationSettings):
    """Options of `caprese bench coverage`."""

    tasks: Tasks = "demo-math"
    limit: Limit = PROBLEMS
    samples: Annotated[int, typer.Option(min=2, help="Samples of a problem in a pool: the largest K.")] = 100
    pools: Annotated[int, typer.Option(min=1, help="Independent pools.")] = 10
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help=f"Default: the task's, or {TEMPERATURE} if that is greedy.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(min=0.01, max=1, help=f"Default: the task's, or {TOP_P} if that is greedy.")
    ] = None
    concurrency: Concurrency = 8
    quick: Annotated[bool, typer.Option("--quick", help="10 problems, two pools of 20 samples at most.")] = False
    resume: Resume = False

    def pooled_run(self, task: Task) -> EvaluationRun:
        """The task, asked once for each pool. Raises CapreseError for a task of lm-eval."""
        if task.lm_eval is not None:
            raise CapreseError(
                "--tasks",
                expected="tasks with a grader of their own, as math500 or demo-math",
                found=task.name,
                fix="leave it out: lm-eval scores one answer to each problem",
            )
        temperature, top_p = self.temperature, self.top_p
        if task.sampling.temperature == 0:
            temperature, top_p = temperature or TEMPERATURE, top_p or TOP_P
        run = self.evaluation_run(task, self.pools, temperature=temperature, top_p=top_p, max_tokens=self.max_tokens)
        return replace(run, samples=self.samples)


@options_of(CoverageSettings)
def coverage(settings: CoverageSettings) -> None:
    """Pass@K over K and over compute, mean and deviation over pools of samples: figure 3, through vLLM."""
    from .collecting import ResponseCollector

    check_writable(settings.out)
    if settings.quick:
        settings = replace(
            settings,
            limit=min(settings.limit or 10, 10),
            pools=min(settings.pools, 2),
            samples=min(settings.samples, 20),
        )
    model = settings.served_model()
    runs = [settings.pooled_run(task) for task in chosen(settings.tasks)]
    counted = count(model.name, model_config(model.model))
    result = Result("coverage", settings.provenance(model, runs, settings.quick), KEYS, MEASURES)
    collector = ResponseCollector(model, settings.out / "coverage", settings.resume, settings.concurrency)
    with recording(result, settings.out, plots, False, COLUMNS) as record:
        for answers in collector.collect(runs):
            record.add(*rows(model.name, answers, activated(counted, answers.variant)))
    show(result, COLUMNS, settings.as_json, only=lambda row: row["k"] in SHOWN)


def activated(counted: ParameterCount, variant: ServedVariant) -> float:
    """A: the share of the model's parameters that a generated token needs."""
    method = variant.method
    if method is None:
        return 1.0
    return 1 - spared_share(counted, method.name, len(method.layers), method.rank, method.mean_density)


def correct(answers: Answers) -> list[list[int]]:
    """The number of correct samples, by pool and problem."""
    problems, by_pool = answers.run.problems, []
    for pool in answers.responses:
        scores = [problems.score(texts) for texts in zip(*(response.texts for response in pool), strict=True)]
        by_pool.append([round(sum(each)) for each in zip(*scores, strict=True)])
    return by_pool


def rows(model: str, answers: Answers, share: float) -> list[Row]:
    """A row for each K; `share` is A."""
    pools, run = correct(answers), answers.run
    sparse, read = answers.counted()
    by_k = []
    for k in range(1, run.samples + 1):
        found = [mean([pass_at_k(run.samples, right, k) for right in pool]) for pool in pools]
        by_k.append(
            {
                "section": run.task.title,
                "model": model,
                "variant": answers.variant.label,
                "k": k,
                "activated": share,
                "compute": k * share,
                "coverage": mean(found),
                "coverage_std": sample_deviation(found),
                "problems": len(run.problems.questions),
                "samples": run.samples,
                "pools": len(pools),
                "tokens": answers.mean_tokens,
                "sparse_tokens": sparse,
                "ff_weights_read": 1.0 if answers.variant.method is None else read,
            }
        )
    return by_k


COLUMNS: Columns = {
    "variant": ("variant", str),
    "problems": ("problems", str),
    "pools": ("pools", str),
    "of": ("samples", str),
    "K": ("k", str),
    "activated": ("activated", "{:.1%}".format),
    "compute": ("compute", "{:.2f}".format),
    "Pass@K": ("coverage", "{:.1%}".format),
    "±": ("coverage_std", "{:.1%}".format),
    "tokens": ("tokens", "{:.1f}".format),
}


def plots(result: Result) -> list[Plot]:
    """Coverage over the number of samples, and over compute."""
    return [
        Plot(section, x, "coverage", ("variant",), label, "Pass@K, ± deviation of pools", error="coverage_std",
             kind="band", log2_x=True, from_zero=False, percent=True)
        for section in result.sections()
        for x, label in (("k", "samples K"), ("compute", "relative compute units, K x A"))
    ]  # fmt: skip
