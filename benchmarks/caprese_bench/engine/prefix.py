"""`caprese bench prefix`: what the prefix cache saves with Caprese, beside plain vLLM, on prompts that share a lot.

All engines run at the same time and take turns; every round begins with an empty cache. The least time to a first token
is that of computing what is not cached. Caprese also computes the statistics of these tokens, and reuses cached tokens
only as far as it has their statistics.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from caprese_serve.provenance import provenance

from ..results.plots import Plot
from ..results.recording import Recording, check_writable, progress, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import ResumableSettings, options_of
from ..results.stats import iqr
from .models import ARCHS, write_arch
from .process import Engine, EngineSettings, first_token

KEYS = ["section", "arch", "variant"]
MEASURES = ["ttft_s", "cached_share"]
Batch = dict[str, Any]  # prompts that arrive together: arguments of the job `generate` of process.py
SECTIONS = (
    "system prompts, one request at a time",
    "system prompts, six requests at a time",
    "conversations",
    "best of 8",
)
# Caprese's configuration of each engine.
ENGINES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "griffin": {"method": "griffin"},
    "cats": {"method": "cats"},
}
# On a CPU the engines share the machine, and each runs in the process that sends it requests.
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
OPTIONS = {
    "seed": 0,
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_seqs": 16,
    "block_size": 32,
}


@dataclass(frozen=True, kw_only=True)
class PrefixSettings(ResumableSettings):
    """Options of `caprese bench prefix`."""

    arch: Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(ARCHS)}.")] = "qwen2.5-0.5b"
    rounds: Annotated[int, typer.Option(min=1, help="How often every section is run on every engine.")] = 5
    quick: Annotated[
        bool, typer.Option("--quick", help="Prompts of a quarter of the length, three rounds at most.")
    ] = False


@options_of(PrefixSettings)
def prefix(settings: PrefixSettings) -> None:
    """Cached tokens and time to first token beside plain vLLM: shared system prompts, conversations, best of 8."""
    check_writable(settings.out)
    shorter, rounds = (4, min(settings.rounds, 3)) if settings.quick else (1, settings.rounds)
    recorded = {"rounds": rounds, "quick": settings.quick}
    result = Result("prefix", provenance() | {"settings": recorded}, KEYS, MEASURES)
    with recording(result, settings.out, PLOTS, settings.resume, COLUMNS) as record:
        todo = {
            section: batches
            for section, batches in loads(random.Random(0), shorter).items()
            if not all(record.has({"section": section, "arch": settings.arch, "variant": name}) for name in ENGINES)
        }
        if todo:
            _measure_all(todo, settings.arch, rounds, record)
    show(result, COLUMNS, settings.as_json)


def _measure_all(sections: Mapping[str, list[Batch]], arch: str, rounds: int, record: Recording) -> None:
    """Section by section, so that an interruption leaves whole sections."""
    logs = {name: record.path.parent / f"prefix-{name}.log" for name in ENGINES}
    with TemporaryDirectory() as folder, ExitStack() as stack, progress() as bar:
        model = write_arch(arch, Path(folder))
        line = bar.add_task("starting engines", total=rounds * len(sections) * len(ENGINES))
        engines = {
            name: stack.enter_context(Engine(logs[name], EngineSettings(str(model), caprese, OPTIONS, CPU)))
            for name, caprese in ENGINES.items()
        }
        for section, batches in sections.items():
            runs: dict[str, list[Run]] = {name: [] for name in engines}
            for _ in range(rounds):
                for name, engine in engines.items():
                    bar.update(line, description=f"{section}, {name}")
                    runs[name].append(_measure(engine, batches))
                    bar.advance(line)
            record.add(*(row(section, arch, name, each, runs["plain"]) for name, each in runs.items()))
    for log in logs.values():  # of engines that ended without an error
        log.unlink()


@dataclass(frozen=True)
class Run:
    """One round of a section on one engine."""

    ttft: list[float]  # seconds to the first token of each request
    cached: int  # prompt tokens taken from the cache
    prompt: int  # all prompt tokens


def loads(rng: random.Random, shorter: int) -> dict[str, list[Batch]]:
    """The batches of each section, which run one after another; their lengths are divided by `shorter`."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(1000, 100_000) for _ in range(max(count // shorter, 1))]

    def batch(*prompts: list[int], n: int = 1) -> Batch:
        return {"prompts": list(prompts), "max_tokens": 2, "n": n}

    systems = [tokens(length) for length in (1100, 1300, 1700)]
    singly = [batch(systems[i % 3] + tokens(20 + 7 * i % 60)) for i in range(18)]
    together = [batch(*(system + tokens(20 + 9 * i) for i in range(6))) for system in systems]
    turns = []
    for _ in range(2):
        conversation = tokens(600)
        for _ in range(5):
            turns.append(batch(conversation))
            conversation = conversation + tokens(180)  # an answer and the next question
    best = [batch(tokens(900), n=8) for _ in range(2)]
    return dict(zip(SECTIONS, (singly, together, turns, best), strict=True))


def _measure(engine: Engine, batches: list[Batch]) -> Run:
    """One round, beginning with an empty prefix cache."""
    answers = [engine.run(**batch, reset=i == 0) for i, batch in enumerate(batches)]
    return Run(
        ttft=[time for answer in answers for time in first_token(answer)],
        cached=sum(sum(answer["cached"]) for answer in answers),
        prompt=sum(len(prompt) for batch in batches for prompt in batch["prompts"]),
    )


def row(section: str, arch: str, variant: str, runs: list[Run], plain: list[Run]) -> Row:
    """An engine's row, with ratios to `plain`. A round's time is the mean over its requests; figures are medians."""
    means, other = ([sum(run.ttft) / len(run.ttft) for run in each] for each in (runs, plain))
    ratios = [ours / theirs for ours, theirs in zip(means, other, strict=True)]
    cached = runs[0].cached
    assert all(run.cached == cached for run in runs)
    return {
        "section": section,
        "arch": arch,
        "variant": variant,
        "requests": len(runs[0].ttft),
        "prompt_tokens": runs[0].prompt,
        "cached_tokens": cached,
        "cached_share": cached / plain[0].cached if plain[0].cached else None,
        "ttft_s": median(means),
        "ttft_iqr_s": iqr(means),
        "ratio": median(ratios),
        "ratio_iqr": iqr(ratios),
        "rounds": len(runs),
    }


COLUMNS: Columns = {
    "engine": ("variant", str),
    "requests": ("requests", str),
    "prompt tokens": ("prompt_tokens", str),
    "cached": ("cached_tokens", str),
    "of plain's": ("cached_share", "{:.1%}".format),
    "first token, s": ("ttft_s", "{:.3f}".format),
    "+-": ("ttft_iqr_s", "{:.3f}".format),
    "ratio": ("ratio", "{:.3f}".format),
    "+- ": ("ratio_iqr", "{:.3f}".format),
}
PLOTS = [
    Plot(section, "variant", "ttft_s", ("variant",), "", "time to first token, s", error="ttft_iqr_s", kind="bar")
    for section in SECTIONS
]
