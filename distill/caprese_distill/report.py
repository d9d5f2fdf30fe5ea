"""What `caprese distill` prints: the plan and its estimate before, the errors and what it really took after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from caprese_kernels.adapters import Adapters
from caprese_kernels.config import BaseModelInfo, Method, layer_spans

from .data.samples import Sample, split
from .end_to_end.train import Recipe, steps_of
from .estimate import Memory, gib, peak_memory
from .layer_wise.adam import AdamSettings
from .stages import Remaining


@dataclass(frozen=True)
class Resources:
    """The estimate, and what was taken since it was made."""

    memory: Memory
    seconds: dict[str, float]  # by stage, what is left
    device: torch.device
    started: float = field(default_factory=time.monotonic)

    def record(self) -> dict[str, Any]:
        """Estimate and reality so far, for `training["resources"]`."""
        estimated = {"host": self.memory.host_peak}
        if self.device.type == "cuda":
            estimated["device"] = self.memory.peak
        return {
            "seconds": round(time.monotonic() - self.started, 1),
            "estimated_seconds": round(sum(self.seconds.values()), 1),
            "peak_bytes": peak_memory(self.device),
            "estimated_bytes": estimated,
        }


def report_plan(
    console: Console,
    model: Any,
    info: BaseModelInfo,
    method: Method,
    recipe: Recipe | None,
    samples: Sequence[Sample],
    given: int,
    memory: Memory,
    adam: AdamSettings | None = None,
    weighting: bool = False,
) -> None:
    """What is going to be done, and the memory that it takes; `given` rows gave these samples."""
    count = sum(p.numel() for p in model.parameters())
    added = 2 * info.hidden_size * method.rank * len(method.layers)
    in_blocks = 3 * info.hidden_size * info.intermediate_size * info.num_hidden_layers
    prompt = sum(s.prompt_length for s in samples)
    response = sum(s.num_rows for s in samples)
    fit, held_out = split(samples)
    spans = layer_spans(method.layers)
    rows = {
        "model": f"{info.name_or_path}, {info.architecture}, {count:,} parameters",
        "FF blocks": f"{info.num_hidden_layers} found, {len(method.layers)} replaced: layers {spans}",
        "method": str(method),
        # Paper, appendix B, figure 6: of the whole model, and of its FF blocks alone.
        "adapter": f"{added:,} parameters, {added / count:.2%} of the model's, {added / in_blocks:.2%} of its FF "
        f"blocks'; {gib(memory.output)}",
        "stages": f"layer-wise ({f'Adam, {adam.epochs} epochs' if adam else 'closed form'})"
        + (", again weighted by the gradient" if weighting else "")
        + (", then end to end" if recipe else ""),
        "samples": f"{len(samples):,} used, {len(held_out):,} of them held out; {given - len(samples):,} skipped",
        "tokens": f"{prompt:,} of prompts, {response:,} of responses",
    }
    if recipe:
        rows["training"] = (
            f"{len(steps_of(fit, recipe)):,} optimizer steps of {recipe.batch} samples, {recipe.epochs} epochs, "
            f"learning rate {recipe.learning_rate:g}"
        )
    rows["disk"] = f"{gib(memory.disk)} at the most while it runs, checkpoints included"
    table = Table("", "plan", show_header=False, title="plan")
    for key, told in rows.items():
        table.add_row(key, told)
    console.print(table)
    _report_memory(console, memory)


def _report_memory(console: Console, memory: Memory) -> None:
    table = Table("where", "what", title="memory")
    table.add_column("estimate", justify="right")
    place = "GPU" if memory.host else "always"
    for what, size in memory.always.items():
        table.add_row(place, what, gib(size))
    for stage, parts in memory.stages.items():
        for what, size in parts.items():
            if size:
                table.add_row(stage, what, gib(size))
    for what, size in memory.host.items():
        table.add_row("host", what, gib(size))
    if memory.host:
        table.add_row("host", "peak", gib(memory.host_peak), style="bold")
    table.add_row("GPU" if memory.host else "", "peak", gib(memory.peak), style="bold")
    console.print(table)


def report_estimate(console: Console, resources: Resources, left: Remaining) -> None:
    """Seconds by stage: of the rest, where an earlier run did a part."""
    told = ", ".join(f"{stage} {minutes(seconds)}" for stage, seconds in resources.seconds.items())
    rest = "of what an earlier run left" if left.resumed else "estimated from a few batches"
    console.print(f"time, {rest}: {minutes(sum(resources.seconds.values()))} ({told or 'nothing left to do'})")


def solver(training: dict[str, Any]) -> str:
    """ "closed-form", or with what it was weighted."""
    weighted = f", weighted by the {training['weighting']}" if "weighting" in training else ""
    return f"{training['solver']}{weighted}"


def minutes(seconds: float) -> str:
    """A duration as a user reads it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def taken(resources: dict[str, Any]) -> str:
    """ "estimated 4.1 GiB, 12.0 min; was 4.0 GiB, 11.5 min", from `training["resources"]`."""

    def side(seconds: float, sizes: dict[str, int]) -> str:
        names = {"host": "", "device": " on the GPU"}
        return ", ".join([*(gib(size) + names[place] for place, size in sizes.items()), minutes(seconds)])

    estimated = side(resources["estimated_seconds"], resources["estimated_bytes"])
    return f"estimated {estimated}; was {side(resources['seconds'], resources['peak_bytes'])}"


def report(adapters: Adapters, output: Path, card: Path | None) -> None:
    """Errors of every layer on held-out samples, those of the whole model, what it took, and the files."""
    config, training = adapters.config, adapters.config.training
    console = Console()
    table = Table(
        title=f"{config.method}, density {config.density:g}, rank {config.rank}, layer-wise by {solver(training)}, "
        "held-out samples"
    )
    for column in ("layer", "||E||²/||FF||²", "with L R", "remaining", "remaining (fitted)", "ridge"):
        table.add_column(column, justify="right")
    for layer, row in training["errors"].items():
        parts = [f"{row[key]:.1%}" for key in ("error_before", "error_after", "remaining", "remaining_fit")]
        table.add_row(layer, *parts, "-" if row["ridge"] is None else f"{row['ridge']:g}")
    console.print(table)
    if "end_to_end" in training:
        errors = training["end_to_end"]["held_out_errors"]
        told = ", ".join(f"epoch {n}: {error:.2%}" for n, error in enumerate(errors))
        console.print(f"last hidden state, ||M - M_student||²/||M||² on held-out samples: {told}")
        if errors[-1] > errors[0]:
            console.print("end-to-end training made it worse: give a lower --learning-rate, or --stage layer-wise")
    if training["resources"]:
        console.print(f"memory and time: {taken(training['resources'])}")
    size = output.stat().st_size / 2**20
    tokens = f"{training['samples']} samples, {training['tokens']:,} response tokens, {training['seconds']:g} s"
    console.print(f"wrote {output} ({size:.1f} MiB, {str(adapters.dtype).removeprefix('torch.')}): {tokens}")
    if card:
        console.print(f"wrote {card}")
    else:
        console.print("no model card: files of its names are there already, and not this adapter's")
