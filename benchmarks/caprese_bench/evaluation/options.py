"""Options that the accuracy benchmarks have in common, and what they mean together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_kernels.errors import CapreseError
from caprese_serve.provenance import provenance

from .tasks import GROUPS, Sampling, Task, chosen, names

if TYPE_CHECKING:
    from .asking import Sitting
    from .variants import Bench

ALL = f"Comma-separated, of {', '.join(GROUPS)} and {', '.join(names())}."
Tasks = Annotated[str, typer.Option(help=ALL)]
Model = Annotated[
    str | None, typer.Option(help="Directory or Hub id; default the demo's model, with --url the one that it tells.")
]
Weights = Annotated[list[str] | None, typer.Option(help="Adapter; may be repeated. The demo's model has its own.")]
Variants = Annotated[
    str | None,
    typer.Option(help="Comma-separated, of full, griffin, caprese-griffin, cats, caprese-cats. Default all there are."),
]
Url = Annotated[
    str | None, typer.Option(help="A Caprese server that runs already: Full, and what it serves. Nobody else asks it.")
]
Data = Annotated[
    list[str] | None, typer.Option(metavar="TASK=FILE", help="Local JSONL instead of the Hub; may be repeated.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many problems of each task, the first ones.")]
Runs = Annotated[int | None, typer.Option(min=1, help="Instead of each task's own; greedy tasks have one.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests in flight.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Of a response, instead of each task's own.")]
Seed = Annotated[int, typer.Option(min=0, help="Of sampling.")]
ServeArgs = Annotated[str, typer.Option(help="More flags for `vllm serve`, as one text.")]
Resume = Annotated[bool, typer.Option("--resume", help="Ask only what an earlier run left unanswered in --out.")]


def subject(
    tasks: str,
    model: str | None,
    weights: Sequence[str] | None,
    url: str | None,
    serve_args: str,
    variants: str | None,
) -> tuple[list[Task], Bench]:
    """The tasks, and what is asked."""
    from .variants import bench_of

    if url is not None and serve_args:
        raise CapreseError("--url", expected="the server as it runs", found="--serve-args", fix="leave one out")
    return chosen(tasks), bench_of(model, weights or [], url, serve_args, variants)


def sittings_of(
    tasks: Sequence[Task],
    data: Sequence[str] | None,
    limit: int | None,
    runs: int | None,
    seed: int,
    **changes: float | None,
) -> list[Sitting]:
    """Each task with its problems, asked as it says; `changes` to its sampling are those not None."""
    from .asking import Sitting
    from .exams import exam_of

    files = _files(data or [], tasks)
    told = {name: value for name, value in changes.items() if value is not None}
    made = []
    for task in tasks:
        sampling = Sampling.model_validate(task.sampling.model_dump() | told)
        times = (runs or task.runs) if sampling.temperature > 0 else 1
        made.append(Sitting(task, exam_of(task, files.get(task.name), limit), sampling, times, seed=seed))
    return made


def origin(bench: Bench, sittings: Sequence[Sitting], data: Sequence[str] | None, **settings: Any) -> dict[str, Any]:
    """The provenance of a result: also how each task was asked."""
    asked = {
        each.task.name: {
            "problems": len(each.exam.questions),
            "runs": each.runs,
            "samples": each.samples,
            "sampling": each.sampling.model_dump(),
            "metric": each.exam.metric,
        }
        for each in sittings
    }
    served = {
        variant.id: None if variant.method is None else bench.identity(variant)["caprese"] for variant in bench.chosen
    }
    told = {"model": bench.name, "url": bench.url, "flags": list(bench.flags), "data": list(data or [])}
    return provenance() | {"settings": told | {"tasks": asked, "variants": served} | settings}


def _files(data: Sequence[str], tasks: Sequence[Task]) -> dict[str, Path]:
    files = {}
    for text in data:
        name, equals, path = text.partition("=")
        known = [task.name for task in tasks]
        if not equals or name not in known:
            raise CapreseError(
                "--data", expected=f"TASK=FILE, with one of {', '.join(known)}", found=text, fix="correct it"
            )
        files[name] = Path(path)
    return files
