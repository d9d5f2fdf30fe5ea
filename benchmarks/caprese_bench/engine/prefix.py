"""`caprese bench prefix`: what the prefix cache saves with Caprese, beside plain vLLM, on prompts that share a lot.

Both engines live at once and take turns, every round with an empty cache. The floor of a time to first token is that of
computing what is not cached; Caprese adds the statistics of these tokens, and reuses only as far as it has pages.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

from caprese_serve.provenance import provenance

from ..results.plots import Plot
from ..results.recording import Recording, check_writable, progress, recording
from ..results.report import Columns, Result, Row, iqr, table, terminal
from .models import ARCHS, write_arch
from .process import Engine, first_token

KEYS = ["section", "arch", "variant"]
MEASURES = ["ttft_s", "cached_share"]
Batch = dict[str, Any]  # a job of engine_process
SECTIONS = (
    "system prompts, one request at a time",
    "system prompts, six requests at a time",
    "conversations",
    "best of 8",
)
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "griffin": {"method": "griffin"},
    "cats": {"method": "cats"},
}


def prefix(
    arch: Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(ARCHS)}.")] = "qwen2.5-0.5b",
    rounds: Annotated[int, typer.Option(min=1, help="Times that every load is run on every engine.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Prompts of a quarter of the length, three rounds at most.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that are in --out already.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for prefix.json, .csv and .html.")] = Path("out/bench"),
) -> None:
    """Cached tokens and time to first token beside plain vLLM: shared system prompts, conversations, best of 8."""
    check_writable(out)
    shorter, rounds = (4, min(rounds, 3)) if quick else (1, rounds)
    result = Result("prefix", provenance() | {"settings": {"rounds": rounds, "quick": quick}}, KEYS, MEASURES)
    jobs = loads(random.Random(0), shorter)
    console = terminal()
    with recording(result, out, PLOTS, resume, console, COLUMNS) as record:
        names = {
            section: [{"section": section, "arch": arch, "variant": name} for name in VARIANTS] for section in jobs
        }
        todo = {section: each for section, each in jobs.items() if not all(map(record.has, names[section]))}
        if todo:
            _measure_all(todo, arch, rounds, record, console)
    for section, rows in result.sections().items():
        console.print(table(section, rows, COLUMNS))


def _measure_all(jobs: Mapping[str, list[Batch]], arch: str, rounds: int, record: Recording, console: Console) -> None:
    """Section by section, so that what was measured is whole when the run is stopped."""
    with TemporaryDirectory() as folder, ExitStack() as stack, progress(console) as bar:
        model = write_arch(arch, Path(folder))
        line = bar.add_task("starting engines", total=rounds * len(jobs) * len(VARIANTS))
        engines = {
            name: stack.enter_context(
                Engine(record.path.parent / f"prefix-{name}.log", CPU, model=str(model), caprese=caprese, engine=ENGINE)
            )
            for name, caprese in VARIANTS.items()
        }
        for section, batches in jobs.items():
            seen: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
            for _ in range(rounds):
                for name, engine in engines.items():
                    bar.update(line, description=f"{section}, {name}")
                    seen[name].append(_measure(engine, batches))
                    bar.advance(line)
            record.add(*(_row(section, arch, name, runs, seen["plain"]) for name, runs in seen.items()))
    for name in VARIANTS:  # of engines that ended well
        (record.path.parent / f"prefix-{name}.log").unlink()


# On a CPU: engines share the machine, and each runs in the process that asks it.
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
ENGINE = {
    "seed": 0,
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_seqs": 16,
    "block_size": 32,
}


def loads(rng: random.Random, shorter: int) -> dict[str, list[Batch]]:
    """Batches of prompts, one after another; a batch's prompts arrive together."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(1000, 100_000) for _ in range(max(count // shorter, 1))]

    def job(*prompts: list[int], n: int = 1) -> Batch:
        return {"prompts": prompts, "max_tokens": 2, "n": n}

    systems = [tokens(length) for length in (1100, 1300, 1700)]
    singly = [job(systems[i % 3] + tokens(20 + 7 * i % 60)) for i in range(18)]
    together = [job(*(system + tokens(20 + 9 * i) for i in range(6))) for system in systems]
    turns = []
    for _ in range(2):
        conversation = tokens(600)
        for _ in range(5):
            turns.append(job(conversation))
            conversation = conversation + tokens(180)  # an answer and the next question
    best = [job(tokens(900), n=8) for _ in range(2)]
    return dict(zip(SECTIONS, (singly, together, turns, best), strict=True))


def _measure(engine: Engine, batches: list[Batch]) -> dict[str, Any]:
    """One round of a load: all times to first token, and the tokens cached."""
    answers = [engine.ask(**batch, reset=i == 0) for i, batch in enumerate(batches)]
    return {
        "ttft": [time for answer in answers for time in first_token(answer)],
        "cached": sum(sum(answer["cached"]) for answer in answers),
        "prompt": sum(len(prompt) for batch in batches for prompt in batch["prompts"]),
    }


def _row(section: str, arch: str, variant: str, runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Row:
    """The time of a round is the mean over its requests; the figure is the median of rounds."""
    means, other = ([sum(run["ttft"]) / len(run["ttft"]) for run in each] for each in (runs, plain))
    ratios = [ours / theirs for ours, theirs in zip(means, other, strict=True)]
    cached = runs[0]["cached"]
    assert all(run["cached"] == cached for run in runs)
    return {
        "section": section,
        "arch": arch,
        "variant": variant,
        "requests": len(runs[0]["ttft"]),
        "prompt_tokens": runs[0]["prompt"],
        "cached_tokens": cached,
        "cached_share": cached / plain[0]["cached"] if plain[0]["cached"] else None,
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
