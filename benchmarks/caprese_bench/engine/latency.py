"""`caprese bench latency`: the paper's table 4 through vLLM: Full, GRIFFIN, LoRA, Caprese, CATS, Caprese (CATS);
and selections with a core.

Each variant is an engine of its own. As many as fit into memory run at the same time and take turns, so that a
disturbance of the machine affects all of them and a ratio compares times of one round. Full is plain vLLM. A step
cannot be faster than reading the bytes that it needs (kernels/floor.py): beside every measured ratio stands the one
that these bytes predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_serve.provenance import provenance

from ..results.plots import Plot
from ..results.recording import check_writable, progress, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import ConfigOption, ResumableSettings, options_of
from .latency_cases import BATCH, ONE, SAMPLES, Case, make_cases
from .models import ARCHS
from .variants import PAPER, VARIANTS, choose_variants

if TYPE_CHECKING:
    from ..results.recording import Recording
    from .process import Engine
    from .timed_model import TimedModel
    from .variants import Variant

KEYS = ["section", "arch", "setup", "batch", "samples", "variant"]
MEASURES = ["tpot_ms", "e2e_s", "ttft_s", "ratio"]
ON_GPU, ON_CPU = "2048+256,2048+2048", "256+32,256+128"  # setups; the GPU's are the paper's


@dataclass(frozen=True, kw_only=True)
class LatencySettings(ResumableSettings):
    """Options of `caprese bench latency`."""

    arch: Annotated[
        str | None,
        typer.Option(help=f"Shape, with dummy weights, of: {', '.join(ARCHS)}. Default: one that fits the machine."),
    ] = None
    model: Annotated[str | None, typer.Option(help="Directory or Hub id of a checkpoint, instead of a shape.")] = None
    weights: Annotated[
        list[str] | None, typer.Option(help="Adapter for the checkpoint; one for each method of the paper's variants.")
    ] = None
    data: Annotated[
        str | None, typer.Option(help="Text for the prompts, as for `caprese distill`. Default: random tokens.")
    ] = None
    setups: Annotated[
        str | None, typer.Option(help=f"P+G prompt and generated tokens. Default: {ON_GPU} on a GPU, else {ON_CPU}.")
    ] = None
    variants: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(VARIANTS)}.")] = PAPER
    configs: ConfigOption = None
    batch: Annotated[
        str, typer.Option(help="Comma-separated numbers of prompts at once, measured in the first setup.")
    ] = ""
    samples: Annotated[str, typer.Option("--n", help="Comma-separated numbers of samples of one prompt at once.")] = ""
    rounds: Annotated[int, typer.Option(min=2, help="How often every case is run on every engine.")] = 5
    density: Annotated[float, typer.Option(min=0.01, max=1, help="Of the plain methods and random adapters.")] = 0.5
    rank: Annotated[
        int, typer.Option(min=1, help="Rank of random L and R; LoRA gets as many parameters as these have.")
    ] = 256
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16"
    eager: Annotated[bool, typer.Option("--eager", help="Without compilation and CUDA graphs.")] = False
    together: Annotated[
        int | None, typer.Option(min=2, help="Engines that run at once. Default: as many as fit into memory.")
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="One short setup, two rounds, four variants, eager.")] = False


@options_of(LatencySettings)
def latency(settings: LatencySettings) -> None:
    """End-to-end latency, time to first and to next token of the paper's table 4, through vLLM."""
    import torch

    from ..kernels.timing import bandwidth
    from . import engines
    from .timed_model import configured_variants, load_timed_model

    check_writable(settings.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.quick:
        few = "full,griffin,lora,caprese" if settings.variants.count(",") > 3 else settings.variants
        settings = replace(settings, setups=settings.setups or "64+16", rounds=2, eager=True, variants=few)
    variants = choose_variants(settings.variants)
    cases = make_cases(settings.setups or (ON_GPU if device == "cuda" else ON_CPU), settings.batch, settings.samples)
    arch = settings.arch or ("qwen2.5-14b" if device == "cuda" else "qwen2.5-0.5b")
    with TemporaryDirectory() as scratch:
        model = load_timed_model(
            arch, settings.model, settings.weights or [], settings.density, settings.rank, settings.dtype, Path(scratch)
        )
        variants += configured_variants(model, settings.configs or [])
        kv_gib = engines.kv_gib(model, max(case.requests * (case.prompt + case.generated) for case in cases))
        bandwidth_source, bandwidth_gb_s = bandwidth(device)
        together = settings.together or engines.engines_that_fit(model, device, kv_gib)
        result = Result(
            "latency", provenance() | {"settings": _recorded(settings, model, variants, device)}, KEYS, MEASURES
        )
        result.provenance |= {"bandwidth": bandwidth_source, "bandwidth_gb_s": bandwidth_gb_s}
        with recording(result, settings.out, plots, settings.resume, COLUMNS) as record:
            for group in engines.groups(variants, min(together, len(variants))):
                todo = [case for case in cases if any(not record.has(case.key(model, v)) for v in group[1:] or group)]
                if todo:
                    options = _engine_options(model, device, cases, kv_gib, len(group), settings.eager)
                    jobs = {v.id: engines.settings_of(model, v, options, Path(scratch)) for v in group}
                    with engines.running(jobs, device, kv_gib, settings.out, "latency") as running:
                        _measure(todo, model, group, running, settings, record)
            result.rows.sort(key=_row_order)
    show(result, COLUMNS, settings.as_json)


def _engine_options(
    model: TimedModel, device: str, cases: Sequence[Case], kv_gib: float, together: int, eager: bool
) -> dict[str, Any]:
    """vLLM's options for one of the engines that run together: room for the longest and the largest case."""
    from .engines import engine_options
    from .latency_measure import WARM_UP

    max_len = max(case.prompt + case.generated for case in cases) + WARM_UP
    max_seqs = max(case.requests for case in cases)
    return engine_options(model, device, max_len, max_seqs, kv_gib, 0.9 / together, eager)


def _measure(
    cases: Sequence[Case],
    model: TimedModel,
    variants: Sequence[Variant],
    engines: dict[str, Engine],
    settings: LatencySettings,
    record: Recording,
) -> None:
    from .latency_measure import measure
    from .latency_rows import rows

    with progress() as bar:
        line = bar.add_task("", total=len(cases) * len(variants) * (settings.rounds + 1))
        for case in cases:
            runs = measure(
                case,
                model,
                settings.data,
                variants,
                engines,
                settings.rounds,
                lambda text: bar.update(line, description=text, advance=1),
            )
            record.add(*rows(case, model, runs, record.result.provenance["bandwidth_gb_s"]))


def _recorded(settings: LatencySettings, model: TimedModel, variants: Sequence[Variant], device: str) -> dict[str, Any]:
    """The settings that the provenance records: those that rows depend on and do not name themselves."""
    import torch

    adapters = {method: sha256(path.read_bytes()).hexdigest()[:16] for method, (path, _) in model.adapters.items()}
    return {
        "rounds": settings.rounds,
        "density": settings.density,
        "rank": settings.rank,
        "dtype": settings.dtype,
        "compiled": not settings.eager,
        "data": settings.data and Path(settings.data).name,
        "weights": adapters or None,
        "configs": {
            variant.id: variant.configured.caprese | {"adapter": variant.configured.adapter_digest}
            for variant in variants
            if variant.configured is not None
        }
        or None,
        "threads": torch.get_num_threads() if device == "cpu" else None,
    }


def _row_order(row: Row) -> tuple[Any, ...]:
    """The order of rows: by section, model and size of the setup, then variants as in VARIANTS."""
    labels = [variant.label for variant in VARIANTS.values()]
    place = labels.index(row["variant"]) if row["variant"] in labels else len(labels)  # those of --config keep theirs
    section = [ONE, BATCH, SAMPLES].index(row["section"].partition(", ")[0])
    length = sum(map(int, row["setup"].split("+")))
    return section, row["arch"], length, row["batch"], row["samples"], place


COLUMNS: Columns = {
    "variant": ("variant", str),
    "setup": ("setup", str),
    "prompts": ("batch", str),
    "samples": ("samples", str),
    "end to end, s": ("e2e_s", "{:.2f}".format),
    "±": ("e2e_iqr_s", "{:.2f}".format),
    "first token, s": ("ttft_s", "{:.3f}".format),
    "next token, ms": ("tpot_ms", "{:.2f}".format),
    "± ": ("tpot_iqr_ms", "{:.2f}".format),
    "p50": ("tpot_p50_ms", "{:.2f}".format),
    "p99": ("tpot_p99_ms", "{:.2f}".format),
    "of Full": ("ratio", "{:.3f}".format),
    " ±": ("ratio_iqr", "{:.3f}".format),
    "by bytes": ("predicted_ratio", "{:.3f}".format),
    "step of Full": ("step_ratio", "{:.3f}".format),
    "by operations": ("predicted_flop_ratio", "{:.3f}".format),
    "tokens/s of Full": ("throughput_ratio", "{:.3f}".format),
    "MB a step": ("mb_a_step", "{:.0f}".format),
    "GB/s": ("gb_s", "{:.1f}".format),
    "of bandwidth": ("bandwidth_share", "{:.0%}".format),
}


def plots(result: Result) -> list[Plot]:
    """Table 4 as bars, and the sections of several requests as lines; the level is Full."""
    next_token, ratio, setup = "time to next token, ms", "time to next token / Full's", "prompt + generated tokens"
    drawn = []
    for section in result.sections():
        kind = section.partition(", ")[0]
        if kind == ONE:
            drawn += [
                Plot(section, "setup", "tpot_ms", ("variant",), setup, next_token, error="tpot_iqr_ms", kind="bar",
                     show="{:.1f}".format),
                Plot(section, "setup", "e2e_s", ("variant",), setup, "end to end, s", error="e2e_iqr_s", kind="bar",
                     show="{:.1f}".format),
                Plot(section, "setup", "ratio", ("variant",), setup, ratio, error="ratio_iqr", kind="bar", level=1,
                     show="{:.2f}".format),
                Plot(section, "setup", "predicted_ratio", ("variant",), setup, "bytes / Full's", kind="bar", level=1,
                     show="{:.2f}".format),
            ]  # fmt: skip
            continue
        x = "batch" if kind == BATCH else "samples"
        drawn += [
            Plot(section, x, "ratio", ("variant",), kind, ratio, error="ratio_iqr", log2_x=True, level=1),
            Plot(section, x, "tokens_per_s", ("variant",), kind, "tokens/s", log2_x=True),
            Plot(section, x, "throughput_ratio", ("variant",), kind, "tokens/s / Full's", log2_x=True, level=1),
        ]
    return drawn
