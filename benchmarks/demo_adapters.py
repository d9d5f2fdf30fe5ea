"""Makes the demo's two adapters: generated training problems, then `caprese distill` for each method.

    python benchmarks/demo_adapters.py

The problems come from the generators' training split only. Density and layers were chosen on problems of the training
split as well: GRIFFIN must lose enough for a recovery to show, and CATS as much as it loses at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from caprese_distill.cli import Dtype, Weighting, distill
from caprese_serve.demo.problems import TASKS, problems

DEMO = Path(__file__).parents[1] / "serve/caprese_serve/demo"
RANK = 48


@dataclass(frozen=True)
class Settings:
    """What is sparse, and the learning rates: of L and R layer-wise by Adam and end to end, and of LoRA."""

    density: float
    layers: Literal["first-half", "all"]
    adam: float = 1e-3
    end_to_end: float = 2e-4
    lora_layer_wise: float = 1e-3
    lora_end_to_end: float = 2e-4


SETTINGS = {
    "griffin": Settings(0.5, "first-half", adam=3e-2, end_to_end=1e-2, lora_layer_wise=3e-2, lora_end_to_end=1e-2),
    "cats": Settings(0.05, "all", adam=3e-2, end_to_end=1e-2, lora_layer_wise=3e-2, lora_end_to_end=1e-2),
}


def write_rows(path: Path, count: int, seed: int) -> None:
    """`count` training problems, as many of each task, in the format of `caprese distill --data`."""
    made = [list(problems(task, "train", count // len(TASKS), seed)) for task in TASKS]
    rows = [{"prompt": p.prompt, "response": p.response} for group in zip(*made, strict=True) for p in group]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(
    model: Annotated[Path, typer.Option(help="The demo model.")] = DEMO / "model",
    output: Annotated[Path, typer.Option(help="Directory of the adapters.")] = DEMO / "adapters",
    data: Annotated[Path, typer.Option(help="Where to write the training problems.")] = Path("out/demo_train.jsonl"),
    samples: Annotated[int, typer.Option(help="Training problems.")] = 16000,
    seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 1,
    methods: Annotated[str, typer.Option(help="Which adapters, by commas.")] = ",".join(SETTINGS),
) -> None:
    """Write griffin.safetensors and cats.safetensors."""
    write_rows(data, samples, seed)
    for method in methods.split(","):
        chosen = SETTINGS[method]
        file = output / f"{method}.safetensors"
        distill(
            str(model),
            str(data),
            file,
            method=method,
            density=chosen.density,
            layers=chosen.layers,
            rank=RANK,
            learning_rate=chosen.end_to_end,
            gradient_checkpointing=False,  # the model is small
            weighting=Weighting.gradient,
            dtype=Dtype.float32,  # faster than bfloat16 for such a model on a CPU
            instruction="",  # the demo model never saw it
        )


if __name__ == "__main__":
    typer.run(main)
