"""A calibration from its settings to the adapter file: priors of neurons, and what the selections by them cost."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from caprese_kernels import files
from caprese_kernels.adapters import Adapters
from caprese_kernels.config import AdapterConfig, BaseModelInfo, Method
from caprese_kernels.selection import LayerSelector

from ..blocks import find_blocks, resolve_method
from ..data.batches import pack
from ..data.samples import Sample, split
from ..inputs import check_writable, encode_rows, read_rows
from ..loading import find_device, load_model_on, load_small_parts
from ..placement import device_of, return_freed
from ..progress import progress_bar
from .config import CalibrateConfig
from .prior import PriorSums, neuron_norms
from .quality import Quality, measure

DENSITIES = (0.25, 0.5, 0.75)  # reported beside the chosen one
MAX_HELD_OUT = 16  # samples whose quality is measured


@dataclass(frozen=True)
class Calibration:
    """A calibrated file, and what its selections cost on held-out samples."""

    adapter: Path
    adapters: Adapters
    quality: Mapping[float, Quality]  # by density
    plain: Quality  # of the paper's method at the chosen density, each prompt's own selection
    seconds: float

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
    with files.output_lock(config.output):
        return _calibrate(config, console or Console(quiet=True))


def _calibrate(config: CalibrateConfig, console: Console) -> Calibration:
    started = time.monotonic()
    source = read_rows(config)
    check_writable(config.output)
    device = find_device(config.device)
    console.print(str(source), highlight=False, markup=False)
    model_config, tokenizer = load_small_parts(config.model)
    info, method = resolve_method(model_config, config.model, config.method, config.density, 1, config.layers)
    method = replace(method, rank=0, score=config.score, prior=config.prior or 0.0, core=config.core or 0.0)
    samples = encode_rows(config, source, model_config, tokenizer, console)
    model = load_model_on(config.model, config.dtype, device).eval()
    blocks = find_blocks(model, info, method.layers)
    fit, held_out = split(samples)
    priors = collect_priors(model, blocks, fit, method, console)
    quality = _measure(model, blocks, held_out[:MAX_HELD_OUT], method, priors, console)
    plain = quality.pop("plain")
    seconds = time.monotonic() - started
    training = {
        "stage": "calibration",
        "samples": len(samples),
        "samples_held_out": len(held_out),
        "tokens": sum(s.num_rows for s in fit),
        "seconds": round(seconds, 1),
        "quality": {name: {"kl": q.kl, "agreement": q.agreement, "tokens": q.tokens} for name, q in quality.items()},
        "plain": {"kl": plain.kl, "agreement": plain.agreement, "tokens": plain.tokens},
        "data": dict(source.provenance),
        "command": shlex.join(config.command()),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
    }
    adapters = Adapters(_adapter_config(info, method, training), {}, {}, priors)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    adapters.save(config.output)
    by_density = {float(name): found for name, found in quality.items()}
    return Calibration(config.output, adapters, by_density, plain, seconds)


@torch.no_grad()
def collect_priors(
    model: Any, blocks: Mapping[int, nn.Module], samples: Sequence[Sample], method: Method, console: Console
) -> dict[int, Tensor]:
    """p [F] float32 of each layer, from one pass of the original model over the samples' responses."""
    sums = PriorSums(blocks, method.score)
    decoder = model.get_decoder()
    with progress_bar(console, "tok/s") as bar:
        line = bar.add_task("priors", total=sum(len(s.ids) for s in samples))
        for batch in pack(samples, device_of(model.get_input_embeddings())):
            with sums.watch(batch.rows()):
                decoder(input_ids=batch.ids(), use_cache=False)
            return_freed()
            bar.advance(line, batch.num_tokens)
    return sums.priors()


def selectors_of(
    blocks: Mapping[int, nn.Module], method: Method, priors: Mapping[int, Tensor]
) -> dict[int, LayerSelector]:
    """One selector a layer, on the layer's device."""
    found = {}
    for i in method.layers:
        scale = neuron_norms(blocks[i]) if method.weighted else None
        prior = priors[i].to(device_of(blocks[i])) if method.needs_prior else None
        neurons: Any = blocks[i].down_proj
        found[i] = LayerSelector(method, neurons.in_features, scale, prior)
    return found


def _measure(
    model: Any,
    blocks: Mapping[int, nn.Module],
    samples: Sequence[Sample],
    method: Method,
    priors: Mapping[int, Tensor],
    console: Console,
) -> dict[str, Quality]:
    """Quality by density, and "plain": the paper's method."""
    densities = sorted({*DENSITIES, method.density})
    variants = {f"{d:g}": selectors_of(blocks, replace(method, density=d), priors) for d in densities}
    variants["plain"] = selectors_of(blocks, Method(method.name, method.density, method.layers, 0), priors)
    with progress_bar(console, "samples/s") as bar:
        line = bar.add_task("quality", total=len(samples))
        return measure(model, blocks, samples, variants, lambda: bar.advance(line))


def _adapter_config(info: BaseModelInfo, method: Method, training: dict[str, Any]) -> AdapterConfig:
    return AdapterConfig(
        base_model=info,
        method=method.name,
        density=method.density,
        rank=0,
        score=method.score,
        prior=method.prior,
        core=method.core,
        layers=list(method.layers),
        training=training,
    )
