"""`caprese bench coverage`: Pass@K of Full, GRIFFIN, CATS and Caprese over K, the paper's figure 3.

For every problem ten pools of 100 samples; the coverage of a pool is the mean over problems of the unbiased Pass@K, and
what is shown its mean and standard deviation over pools. Compute is K x A in relative units, A the share of parameters
that a generated token needs (`caprese bench parameters`). A problem's samples in a pool are one request: they share a
selection.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from caprese_kernels.errors import CapreseError

from ..paper.families import model_config
from ..recovery.parameters import Count, count, cut
from ..results.plots import Plot
from ..results.recording import check_writable, recording
from ..results.report import Columns, Result, Row, table, terminal
from ..results.stats import mean, pass_at_k, sample_deviation
from . import options

if TYPE_CHECKING:
    from .asking import Answers
    from .tasks import Task
    from .variants import Variant

KEYS = ["section", "model", "variant", "k"]
MEASURES = ["coverage", "compute"]
PROBLEMS = 140  # the paper's
TEMPERATURE, TOP_P = 0.6, 0.95  # of tasks that are greedy otherwise
SHOWN = (1, 2, 5, 10, 20, 50, 100)  # in the terminal


def coverage(
    tasks: options.Tasks = "demo-math",
    model: options.Model = None,
    weights: options.Weights = None,
    variants: options.Variants = None,
    url: options.Url = None,
    data: options.Data = None,
    limit: options.Limit = PROBLEMS,
    samples: Annotated[int, typer.Option(min=2, help="Of a problem in a pool: the largest K.")] = 100,
    pools: Annotated[int, typer.Option(min=1, help="Independent pools.")] = 10,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help=f"Default the task's, {TEMPERATURE} if that is greedy.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0.01, max=1, help=f"Likewise, {TOP_P}.")] = None,
    concurrency: options.Concurrency = 8,
    max_tokens: options.MaxTokens = None,
    seed: options.Seed = 0,
    serve_args: options.ServeArgs = "",
    quick: Annotated[bool, typer.Option("--quick", help="10 problems, two pools of 20 samples at most.")] = False,
    resume: options.Resume = False,
    out: Annotated[Path, typer.Option(help="Folder for coverage.json, .csv, .html and coverage/.")] = Path("out/bench"),
) -> None:
    """Pass@K over K and over compute, mean and deviation over pools of samples: figure 3, through vLLM."""
    from .asking import Examiner

    check_writable(out)
    console = terminal()
    wanted, bench = options.subject(tasks, model, weights, url, serve_args, variants)
    if quick:
        limit, pools, samples = min(limit or 10, 10), min(pools, 2), min(samples, 20)
    sittings = []
    for task in wanted:
        changes = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        changes |= _sampled(task, temperature, top_p)
        sitting = options.sittings_of([task], data, limit, pools, seed, **changes)[0]
        sittings.append(replace(sitting, samples=samples))
    counted = count(bench.name, model_config(bench.model))
    told = options.origin(bench, sittings, data, seed=seed, quick=quick)
    result = Result("coverage", told, KEYS, MEASURES)
    with recording(result, out, plots, False, console, COLUMNS) as record:
        for answers in Examiner(bench, out / "coverage", resume, concurrency, console).ask(sittings):
            record.add(*rows(bench.name, answers, activated(counted, answers.variant)))
    for section, found in result.sections().items():
        console.print(table(section, [each for each in found if each["k"] in SHOWN], COLUMNS))


def _sampled(task: Task, temperature: float | None, top_p: float | None) -> dict[str, float]:
    """What a task that is greedy elsewhere is sampled with; CapreseError for one that cannot be."""
    if task.lm_eval is not None:
        raise CapreseError(
            "--tasks", expected="tasks with a grader of their own, as math500 or demo-math", found=task.name,
            fix="leave it out: lm-eval scores one answer a problem",
        )  # fmt: skip
    if task.sampling.temperature > 0:
        return {}
    return {"temperature": temperature or TEMPERATURE, "top_p": top_p or TOP_P}


def activated(counted: Count, variant: Variant) -> float:
    """A: the share of the model's parameters that a generated token needs."""
    method = variant.method
    if method is None:
        return 1.0
    return 1 - cut(counted, method.name, len(method.layers), method.rank, method.density)


def correct(answers: Answers) -> list[list[int]]:
    """How many samples of each problem are right, by pool."""
    exam, made = answers.sitting.exam, []
    for pool in answers.responses:
        scores = [exam.score(texts) for texts in zip(*(response.texts for response in pool), strict=True)]
        made.append([round(sum(each)) for each in zip(*scores, strict=True)])
    return made


def rows(model: str, answers: Answers, share: float) -> list[Row]:
    """A row for each K."""
    pools, sitting = correct(answers), answers.sitting
    sparse, read = answers.counted()
    made = []
    for k in range(1, sitting.samples + 1):
        found = [mean([pass_at_k(sitting.samples, right, k) for right in pool]) for pool in pools]
        made.append(
            {
                "section": sitting.task.title,
                "model": model,
                "variant": answers.variant.label,
                "k": k,
                "activated": share,
                "compute": k * share,
                "coverage": mean(found),
                "coverage_std": sample_deviation(found),
                "problems": len(sitting.exam.questions),
                "samples": sitting.samples,
                "pools": len(pools),
                "tokens": answers.mean_tokens,
                "sparse_tokens": sparse,
                "ff_weights_read": 1.0 if answers.variant.method is None else read,
            }
        )
    return made


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
    """Over samples, and over compute."""
    return [
        Plot(section, x, "coverage", ("variant",), label, "Pass@K, ± deviation of pools", error="coverage_std",
             kind="band", log2_x=True, from_zero=False, percent=True)
        for section in result.sections()
        for x, label in (("k", "samples K"), ("compute", "relative compute units, K x A"))
    ]  # fmt: skip
