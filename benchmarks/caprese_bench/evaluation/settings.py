"""The options that the benchmarks of a served model have in common, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_kernels.errors import CapreseError
from caprese_serve.provenance import provenance

from ..results.settings import ConfigOption, OutputSettings
from .tasks import GROUPS, Sampling, Task, chosen, names

if TYPE_CHECKING:
    from .runs import EvaluationRun
    from .variants import ServedModel

# Options of which a benchmark may change the default.
Tasks = Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(GROUPS)} and {', '.join(names())}.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first problems of each task, this many.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests in flight.")]
Runs = Annotated[
    int | None,
    typer.Option(min=1, help="How often each problem is asked, instead of the task's own number; greedy: once."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Request only the responses that an earlier run left missing in --out.")
]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(OutputSettings):
    """Which tasks, which model and variants, and how they are asked."""

    tasks: Tasks
    model: Annotated[
        str | None,
        typer.Option(help="Directory or Hub id. Default: the demo's model, or with --url the one that is served."),
    ] = None
    weights: Annotated[
        list[str] | None, typer.Option(help="Adapter; may be repeated. The demo's model has its own.")
    ] = None
    configs: ConfigOption = None
    variants: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, of full, griffin, caprese-griffin, cats, caprese-cats, --config's. Default: all."
        ),
    ] = None
    url: Annotated[
        str | None,
        typer.Option(help="A running Caprese server: measures Full and what it serves. It must have no other clients."),
    ] = None
    api_key: Annotated[
        str | None, typer.Option(help="Key of the server at --url. Default: OPENAI_API_KEY, or VLLM_API_KEY.")
    ] = None
    data: Annotated[
        list[str] | None, typer.Option(metavar="TASK=FILE", help="Local JSONL instead of the Hub; may be repeated.")
    ] = None
    limit: Limit = None
    concurrency: Concurrency = 32
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a response at most, instead of each task's own limit.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0
    serve_args: Annotated[str, typer.Option(help="More flags for `vllm serve`, as one text.")] = ""

    def served_model(self) -> ServedModel:
        """The model and its variants. Raises CapreseError if the options contradict each other."""
        from caprese_serve.address import server_url

        from .variants import RemoteServer, load_served_model

        if self.url is not None and (self.serve_args or self.configs):
            found = "--serve-args" if self.serve_args else "--config"
            raise CapreseError(
                "--url", expected="no settings for a running server", found=found, fix="leave one of them out"
            )
        remote = None if self.url is None else RemoteServer(server_url(self.url), self.api_key)
        return load_served_model(
            self.model, self.weights or [], remote, self.serve_args, self.variants, self.configs or []
        )

    def evaluation_runs(self, repeats: int | None) -> list[EvaluationRun]:
        """Each task with its problems, asked as it says; `repeats` replaces the number of runs of sampled tasks."""
        return [self.evaluation_run(task, repeats, max_tokens=self.max_tokens) for task in chosen(self.tasks)]

    def evaluation_run(self, task: Task, repeats: int | None, **changes: float | None) -> EvaluationRun:
        """One task with its problems; `changes` that are not None replace its sampling."""
        from .problem_sets import load_problems
        from .runs import EvaluationRun

        given = {name: value for name, value in changes.items() if value is not None}
        sampling = Sampling.model_validate(task.sampling.model_dump() | given)
        times = (repeats or task.runs) if sampling.temperature > 0 else 1
        problems = load_problems(task, self._files().get(task.name), self.limit)
        return EvaluationRun(task, problems, sampling, times, seed=self.seed)

    def provenance(self, model: ServedModel, runs: Sequence[EvaluationRun], quick: bool) -> dict[str, Any]:
        """The provenance of a result, with how each task was asked."""
        tasks = {
            each.task.name: {
                "problems": len(each.problems.questions),
                "runs": each.repeats,
                "samples": each.samples,
                "sampling": each.sampling.model_dump(),
                "metric": each.problems.metric,
            }
            for each in runs
        }
        served = {
            variant.id: None if variant.method is None else model.identity(variant)["caprese"]
            for variant in model.chosen
        }
        asked: dict[str, Any] = {
            "model": model.name,
            "url": model.remote.url if model.remote else None,
            "flags": list(model.flags),
            "data": list(self.data or []),
        }
        asked |= {"tasks": tasks, "variants": served, "seed": self.seed, "quick": quick}
        return provenance() | {"settings": asked}

    def _files(self) -> dict[str, Path]:
        """The files of --data, by task."""
        known = [task.name for task in chosen(self.tasks)]
        files = {}
        for text in self.data or []:
            name, equals, path = text.partition("=")
            if not equals or name not in known:
                raise CapreseError(
                    "--data",
                    expected=f"TASK=FILE, with one of {', '.join(known)}",
                    found=repr(text),
                    fix="correct the option",
                )
            files[name] = Path(path)
        return files
