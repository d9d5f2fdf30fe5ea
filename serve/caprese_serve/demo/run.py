"""`caprese demo`: the full model, GRIFFIN, CATS and Caprese answer the same held-out problems through `vllm serve`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from openai import OpenAIError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from caprese_kernels import files, terminal
from caprese_kernels.adapters import read_config
from caprese_kernels.errors import CapreseError

from ..provenance import provenance
from ..server import VllmServer, vllm_program
from . import ADAPTERS, MODEL
from .client import ask
from .problems import TASKS, Problem, problems
from .results import DemoReport, Row, Score, Served, remarks, table

SERVED_NAME = "caprese-demo"
QUESTION = "Leo has 27 apples. Then Leo triples the number of apples. How many apples does Leo have now?"
WARM_UP = 16  # training problems that are sent first and not counted
FLAGS = ("--served-model-name", SERVED_NAME, "--max-model-len", "512", "--max-num-seqs", "64", "--seed", "0",
         "--enforce-eager", "--disable-uvicorn-access-log")  # fmt: skip
# 1 GiB of KV cache is many times what 64 requests of the demo need. The demo needs no network.
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Variant:
    """A row of the table: the dense model or a sparse method, without or with its adapter."""

    id: str
    label: str
    method: Literal["griffin", "cats"] | None = None
    adapter: bool = False

    def settings(self) -> dict[str, Any] | None:
        """The Caprese configuration; None for the dense model. A plain method uses its adapter's density and layers."""
        if self.method is None:
            return None
        if self.adapter:
            return {"weights": str(ADAPTERS[self.method])}
        config = read_config(ADAPTERS[self.method])
        return {"method": self.method, "density": config.density, "layers": config.layers}

    def flags(self) -> tuple[str, ...]:
        """The flags of `vllm serve` for this variant."""
        settings = self.settings()
        if settings is None:
            return ()
        return (
            ("--caprese-weights", settings["weights"]) if self.adapter else ("--caprese-config", json.dumps(settings))
        )


VARIANTS = (
    Variant("full", "Full"),
    Variant("griffin", "GRIFFIN", "griffin"),
    Variant("caprese-griffin", "Caprese (GRIFFIN)", "griffin", adapter=True),
    Variant("cats", "CATS", "cats"),
    Variant("caprese-cats", "Caprese (CATS)", "cats", adapter=True),
)


def run(math: int, reading: int, variants: Sequence[str], concurrency: int, output: Path) -> DemoReport:
    """Serve and grade each variant in turn, and write the report to `output`.

    Raises CapreseError for an unknown variant, or if a server does not start or stops answering.
    """
    chosen = _chosen(variants)
    asked = [*problems("math", "test", math), *problems("reading", "test", reading)]
    with files.output_lock(output):  # before the work: raises if it cannot be written
        rows = [_measure(variant, asked, concurrency, output.parent / "demo-logs") for variant in chosen]
        report = DemoReport(rows=rows, provenance=provenance())
        files.write_text(output, report.model_dump_json(indent=2) + "\n")
    terminal.notes().print(f"Written to {output}.", highlight=False, soft_wrap=True, markup=False)
    return report


def device_flags() -> tuple[str, ...]:
    """The demo's model is float32 where it runs on a CPU."""
    return () if torch.cuda.is_available() else ("--dtype", "float32")


def show(report: DemoReport) -> None:
    """Print the table with remarks on it, and commands to try next."""
    result, notes = terminal.result(), terminal.notes()
    result.print(table(report.rows))
    for remark in remarks(report):
        result.print(f"\n{remark}", highlight=False)
    notes.print(f"\nTry next:\n{_next_steps()}", highlight=False, soft_wrap=True, markup=False)


def _chosen(ids: Sequence[str]) -> list[Variant]:
    known = {variant.id: variant for variant in VARIANTS}
    unknown = [id for id in ids if id not in known]
    if unknown:
        raise CapreseError(
            "--variants", expected=f"some of {','.join(known)}", found=unknown[0], fix="correct the list"
        )
    return [variant for id, variant in known.items() if id in ids]


def _measure(variant: Variant, asked: Sequence[Problem], concurrency: int, logs: Path) -> Row:
    """Start a server, warm it up, send all problems, and stop it."""
    console = terminal.notes()
    log = logs / f"{variant.id}.log"
    warm_up = list(problems("math", "train", WARM_UP))
    console.print(Text.assemble((variant.label, "bold"), "  ", (" ".join(variant.flags()), "dim")), soft_wrap=True)
    with VllmServer(MODEL, *FLAGS, *device_flags(), *variant.flags(), log=log, env=ENV, console=console) as server:
        try:
            ask(server, SERVED_NAME, warm_up, concurrency)
            before = _counted(server, variant)
            with _progress(console) as progress:
                bar = progress.add_task(f"  started in {server.startup_seconds:.0f} s, asking", total=len(asked))
                answers, wall = ask(server, SERVED_NAME, asked, concurrency, lambda: progress.advance(bar))
            after = _counted(server, variant)
        except OpenAIError as error:
            raise server.failure(f"{type(error).__name__}: {error}") from None
    tokens = sum(answer.tokens for answer in answers)
    math, reading = (Score.of([a.correct for a in answers if a.problem.task == task]) for task in TASKS)
    return Row(
        variant=variant.label,
        math_accuracy=math.accuracy,
        reading_accuracy=reading.accuracy,
        mean_tokens=tokens / len(answers),
        tokens_per_s=tokens / wall,
        ff_weights_read=after.share_since(before),
        math=math,
        reading=reading,
        served=after,
        generated_tokens=tokens,
        wall_s=wall,
        startup_s=server.startup_seconds,
    )


def _counted(server: VllmServer, variant: Variant) -> Served:
    """What the server reports at /caprese; the dense model's server has no such page and reads all weights."""
    return Served.dense() if variant.method is None else Served.model_validate(server.get("/caprese"))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _next_steps() -> str:
    """Commands that serve and distill, with paths relative to the current directory where these are shorter."""
    vllm, caprese = (_short(Path(vllm_program()).with_name(name)) for name in ("vllm", "caprese"))
    return f"""  {vllm} serve {_short(MODEL)} --caprese-weights {_short(ADAPTERS["griffin"])} \\
      --served-model-name {SERVED_NAME} --max-model-len 512
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d \\
      '{{"model": "{SERVED_NAME}", "temperature": 0, "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'
  {caprese} playground    # the full model and Caprese answer side by side, on a page in your browser
  {caprese} distill YOUR_MODEL --method griffin --data YOUR_SAMPLES.jsonl --output adapters.safetensors"""


def _short(path: Path) -> str:
    """The path, absolute or relative to the current directory, whichever is shorter; quoted for a shell."""
    return shlex.quote(min(str(path), os.path.relpath(path), key=len))
