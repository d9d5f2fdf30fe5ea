"""A calibration from its settings to the adapter file: priors of neurons, and what the selections by them cost."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from caprese_kernels import files
from caprese_kernels.adapters import Adapters
from caprese_kernels.config import Method
from caprese_kernels.hub import check_upload

from ..blocks import adapter_config, find_blocks
from ..data.bad_rows import BadRows
from ..data.samples import Sample, split
from ..inputs import chat_renderer, check_writable, encode_rows, read_rows, resolve_selection
from ..loading import find_device, load_model_on, load_small_parts
from ..prior import collect_priors
from ..progress import note, progress_bar
from ..push import push
from ..quality import MAX_HELD_OUT, PAPER, SELECTION, Quality, SparseLayers, measure
from ..report import library_versions
from ..selection import Priors, selectors_of
from .allocate import allocated
from .config import CalibrateConfig
from .sensitivity import measure_harms

DENSITIES = (0.25, 0.5, 0.75)  # reported beside the chosen one


@dataclass(frozen=True)
class Calibration:
    """A calibrated file, and what its selections cost on held-out samples."""

    adapter: Path
    adapters: Adapters
    quality: Mapping[float, Quality]  # by density, the same in every layer
    selection: Quality  # of the file's own selection, with a density for each layer where it has them
    plain: Quality  # of the paper's method at the chosen density, each prompt's own selection
    seconds: float

    @property
    def uniform(self) -> Quality:
        """Of the file's density in every layer."""
        return self.quality[float(f"{self.adapters.config.density:g}")]

    def record(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "adapter": str(self.adapter),
            "bytes": self.adapter.stat().st_size,
            "seconds": round(self.seconds, 1),
            "config": self.adapters.config.model_dump(mode="json"),
        }


def calibrate(config: CalibrateConfig, console: Console | None = None) -> Calibration:
    """Make the adapter file of `config`: priors, without L and R, to serve at once or to distill against.

    One pass of the original model over the samples, a tenth of which is held out to measure what the selections cost.
    CapreseError for data, model or settings that do not fit.
    """
    if config.push_to_hub is not None:
        check_upload(config.push_to_hub)
    with files.output_lock(config.output):
        return _calibrate(config, console or Console(quiet=True))


def _calibrate(config: CalibrateConfig, console: Console) -> Calibration:
    started = time.monotonic()
    bad_rows = BadRows(config.max_bad_rows)
    source = read_rows(config, bad_rows)
    check_writable(config.output)
    device = find_device(config.device)
    for text in (str(source), *source.notes):
        note(console, text)
    model_config, tokenizer = load_small_parts(config.model)
    info, method = resolve_selection(config, model_config, rank=0)
    renderer = chat_renderer(config, model_config, tokenizer, console)
    samples = encode_rows(config, source, model_config, renderer, bad_rows, console)
    model = load_model_on(config.model, config.dtype, device).eval()
    blocks = find_blocks(model, info, method.layers)
    fit, held_out = split(samples)
    priors = collect_priors(model, fit, info, method, console=console)
    recorded: dict[str, Any] = {}
    if config.allocate:
        # Not by the held-out samples: they show whether it was worth it.
        harms = measure_harms(model, blocks, fit, method, priors, config.seed, console)
        method = allocated(method, harms, info.intermediate_size)
        recorded["harms"] = {str(i): {str(k): harm for k, harm in by_count.items()} for i, by_count in harms.items()}
    quality = _measure(model, blocks, held_out[:MAX_HELD_OUT], method, priors, console)
    plain, selection = quality.pop(PAPER), quality.pop(SELECTION)
    seconds = time.monotonic() - started
    training = {
        "stage": "calibration",
        "samples": len(samples),
        "samples_held_out": len(held_out),
        "tokens": sum(s.num_rows for s in fit),
        "seconds": round(seconds, 1),
        "quality": {PAPER: asdict(plain), SELECTION: asdict(selection)},
        "quality_by_density": {name: asdict(q) for name, q in quality.items()},
        **recorded,
        "data": dict(source.provenance),
        "command": shlex.join(config.command()),
        "versions": library_versions(),
    }
    adapters = Adapters(adapter_config(info, method, training), {}, {}, priors)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    adapters.save(config.output)
    by_density = {float(name): found for name, found in quality.items()}
    result = Calibration(config.output, adapters, by_density, selection, plain, seconds)
    if config.push_to_hub is not None:
        address = push(config.push_to_hub, config.output, result.record(), adapters)
        note(console, f"uploaded: {address}")
    return result


def _measure(
    model: Any,
    blocks: Mapping[int, nn.Module],
    samples: Sequence[Sample],
    method: Method,
    priors: Priors,
    console: Console,
) -> dict[str, Quality]:
    """Quality by density in every layer, that of the paper's method (PAPER), and that of `method` (SELECTION)."""
    densities = sorted({*DENSITIES, method.density})
    methods = {f"{d:g}": replace(method, density=d, densities=None) for d in densities}
    methods[PAPER] = Method(method.name, method.density, method.layers, 0)
    if method.densities is not None:
        methods[SELECTION] = method
    variants = {name: SparseLayers(selectors_of(blocks, each, priors)) for name, each in methods.items()}
    with progress_bar(console, "samples/s") as bar:
        line = bar.add_task("quality", total=len(samples))
        found = measure(model, blocks, samples, variants, lambda: bar.advance(line))
    return {SELECTION: found[f"{method.density:g}"]} | found
