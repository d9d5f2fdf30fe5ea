"""Makes the demo's two adapters: generates training problems, then runs `caprese distill` for each method.

    python tools/demo_adapters.py

The problems are from the generators' training split only; the settings are those of `caprese bench recovery`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from caprese_bench.recovery.demo_settings import RANK, SETTINGS
from caprese_distill import DistillConfig, distill
from caprese_distill.report import render_result
from caprese_serve.demo import ADAPTERS, MODEL
from caprese_serve.demo.problems import TASKS, problems


def write_rows(path: Path, count: int, seed: int) -> None:
    """Write `count` training problems, equally many of each task, in the format of `caprese distill --data`."""
    made = [list(problems(task, "train", count // len(TASKS), seed)) for task in TASKS]
    rows = [{"prompt": p.prompt, "response": p.response} for group in zip(*made, strict=True) for p in group]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(
    model: Annotated[Path, typer.Option(help="The demo model.")] = MODEL,
    output: Annotated[Path, typer.Option(help="Directory of the adapters.")] = ADAPTERS["griffin"].parent,
    data: Annotated[Path, typer.Option(help="Where to write the training problems.")] = Path("out/demo_train.jsonl"),
    samples: Annotated[int, typer.Option(help="Training problems.")] = 16000,
    seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 1,
    methods: Annotated[str, typer.Option(help="Comma-separated: the adapters to make.")] = ",".join(SETTINGS),
) -> None:
    """Write griffin.safetensors and cats.safetensors."""
    write_rows(data, samples, seed)
    for method in methods.split(","):
        chosen = SETTINGS[method]
        file = output / f"{method}.safetensors"
        config = DistillConfig(
            model=str(model),
            data=str(data),
            output=file,
            method=method,  # type: ignore[arg-type]  # a key of SETTINGS
            density=chosen.density,
            score="paper",  # as published: the paper's selection, without prior and core
            prior=0.0,
            core=0.0,
            layers=chosen.layers,
            rank=RANK,
            learning_rate=chosen.end_to_end,
            gradient_checkpointing=False,  # the model is small
            weighting="gradient",
            dtype="float32",  # faster than bfloat16 for such a model on a CPU
            instruction="",  # the demo model never saw it
        )
        for part in render_result(distill(config, Console(stderr=True))):
            Console().print(part, markup=False)


if __name__ == "__main__":
    typer.run(main)
