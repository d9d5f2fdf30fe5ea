"""What `caprese distill` prints: the plan and its estimate before, the errors and the resources used after."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from caprese_kernels.config import AdapterConfig, describe_density, layer_spans

from .memory import Memory, gib
from .plan import DistillationPlan, Estimate, ResourceUsage
from .quality import ADAPTER, PAPER, SELECTION, Quality
from .result import Result


def render_plan(plan: DistillationPlan) -> list[RenderableType]:
    """Tables of what will be done, and of the memory that it takes."""
    work, memory = plan.work, plan.memory
    info, method, adam, recipe = work.info, work.method, work.adam, work.recipe
    added, total = plan.adapter_parameters, plan.model_parameters
    in_blocks = 3 * info.hidden_size * info.intermediate_size * info.num_hidden_layers
    rows = {
        "model": f"{info.name_or_path}, {info.architecture}, {total:,} parameters",
        "FF blocks": f"{info.num_hidden_layers} found, {len(method.layers)} replaced: layers "
        f"{layer_spans(method.layers)}",
        "method": str(method),
        # Paper, appendix B, figure 6: of the whole model, and of its FF blocks alone.
        "adapter": f"{added:,} parameters, {added / total:.2%} of the model's, {added / in_blocks:.2%} of its FF "
        f"blocks'; {gib(memory.output)}",
        "stages": ("priors, " if work.collects_priors else "")
        + f"layer-wise ({f'Adam, {adam.epochs} epochs' if adam else 'closed form'})"
        + (", again weighted by the gradient" if work.weighting else "")
        + (", then end to end" if recipe else ""),
        "samples": f"{len(work.samples):,} used, {plan.held_out:,} of them held out; "
        f"{plan.rows - len(work.samples):,} skipped",
        "tokens": f"{plan.prompt_tokens:,} of prompts, {plan.response_tokens:,} of responses",
    }
    if recipe:
        rows["training"] = (
            f"{plan.steps:,} optimizer steps of {recipe.batch} samples, {recipe.epochs} epochs, "
            f"learning rate {recipe.learning_rate:g}"
        )
    rows["disk"] = f"at most {gib(memory.disk)} during the run, checkpoints included"
    table = Table("", "plan", show_header=False, title="plan")
    for key, value in rows.items():
        table.add_row(key, value)
    return [table, _memory_table(memory)]


def _memory_table(memory: Memory) -> Table:
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
    return table


def render_estimate(estimate: Estimate | None) -> str:
    """The time in all and by stage; after an interrupted run, of the remaining work."""
    if estimate is None:
        return "time: only estimated for one process on one device"
    stages = ", ".join(f"{stage} {format_duration(seconds)}" for stage, seconds in estimate.seconds.items())
    scope = "for what an earlier run left" if estimate.resumed else "estimated from a few batches"
    return f"time, {scope}: {format_duration(sum(estimate.seconds.values()))} ({stages or 'nothing left to do'})"


def describe_solver(training: dict[str, Any]) -> str:
    """ "closed-form", or "closed-form, weighted by the gradient"."""
    weighted = f", weighted by the {training['weighting']}" if "weighting" in training else ""
    return f"{training['solver']}{weighted}"


def format_duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours: "11.5 min"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def describe_resources(usage: ResourceUsage) -> str:
    """ "estimated 4.1 GiB, 12.0 min; was 4.0 GiB, 11.5 min"."""

    def side(seconds: float, sizes: dict[str, int]) -> str:
        names = {"host": "", "device": " on the GPU"}
        return ", ".join([*(gib(size) + names[place] for place, size in sizes.items()), format_duration(seconds)])

    estimated = side(usage.estimated_seconds, usage.estimated_bytes)
    return f"estimated {estimated}; was {side(usage.seconds, usage.peak_bytes)}"


def render_result(result: Result) -> list[RenderableType]:
    """Errors of every layer and of the whole model on held-out samples, the resources used, and the files."""
    adapters = result.adapters
    config, training = adapters.config, adapters.config.training
    density = describe_density(config.density, config.densities)
    table = Table(
        title=f"{config.method}, density {density}, rank {config.rank}, layer-wise by "
        f"{describe_solver(training)}, held-out samples"
    )
    for column in ("layer", "||E||²/||FF||²", "with L R", "remaining", "remaining (fitted)", "ridge"):
        table.add_column(column, justify="right")
    for layer, errors in result.errors.items():
        shares = (errors.error_before, errors.error_after, errors.remaining, errors.remaining_fit)
        table.add_row(str(layer), *(f"{share:.1%}" for share in shares), _ridge(errors.ridge))
    parts: list[RenderableType] = [table]
    title = f"next token on held-out responses; {config.method}, density {density}"
    parts.append(quality_table(result.quality, title, config))
    if result.quality[ADAPTER].kl > result.quality[SELECTION].kl:
        parts.append("L and R make the next token worse: give more samples, or serve the selection alone (calibrate)")
    if held_out := result.held_out_errors:
        epochs = ", ".join(f"epoch {n}: {error:.2%}" for n, error in enumerate(held_out))
        parts.append(f"last hidden state, ||M - M_student||²/||M||² on held-out samples: {epochs}")
        if divergences := result.held_out_kl:
            epochs = ", ".join(f"epoch {n}: {kl:.4f}" for n, kl in enumerate(divergences))
            parts.append(f"KL(original || student), nats a token, on held-out samples: {epochs}")
        if result.kept_epoch == 0:
            parts.append(
                "end-to-end training made it worse: L and R are the layer-wise ones; use a lower --learning-rate"
            )
        elif result.kept_epoch < len(held_out) - 1:
            parts.append(f"later epochs made it worse: L and R are those after epoch {result.kept_epoch}")
    if result.resources:
        parts.append(f"memory and time: {describe_resources(result.resources)}")
    size = result.adapter.stat().st_size / 2**20
    tokens = f"{training['samples']} samples, {training['tokens']:,} response tokens, {training['seconds']:g} s"
    dtype = str(adapters.dtype).removeprefix("torch.")
    parts.append(f"wrote {result.adapter} ({size:.1f} MiB, {dtype}): {tokens}")
    if result.card:
        parts.append(f"wrote {result.card}")
    else:
        parts.append("no model card: files with its names exist, and are not this adapter's")
    if result.responses:
        parts.append(f"wrote {result.responses}: responses that --data reads")
    return parts


def quality_table(quality: Mapping[str, Quality], title: str, adapter: AdapterConfig) -> Table:
    """Rows of `measure_adapters`, by what they are."""
    chosen = f"score {adapter.score}, prior {adapter.prior:g}, core {adapter.core:g}"
    names = {
        PAPER: "each prompt's own (the paper), without L and R",
        SELECTION: f"{chosen}, without L and R",
        ADAPTER: f"{chosen}, with L and R",
    }
    table = Table("selection", title=title)
    for column in ("KL(original || sparse), nats", "same most likely token", "tokens"):
        table.add_column(column, justify="right")
    for name, found in quality.items():
        style = "bold" if name == ADAPTER else None
        table.add_row(names[name], *quality_cells(found), style=style)
    return table


def quality_cells(found: Quality) -> tuple[str, str, str]:
    """KL, agreement and tokens as tables show them."""
    return f"{found.kl:.3f}", f"{found.agreement:.1%}", f"{found.tokens:,}"


def _ridge(ridge: float | None) -> str:
    return "-" if ridge is None else f"{ridge:g}"


def library_versions() -> dict[str, str]:
    """What the adapter's header records of the software that made it."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return found | {"python": platform.python_version()}
