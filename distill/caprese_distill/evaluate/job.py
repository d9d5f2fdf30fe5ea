"""An evaluation from its settings to figures: the adapter's selection with and without L and R, and the paper's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from caprese_kernels.adapters import Adapters, find_adapter
from caprese_kernels.config import BaseModelInfo

from ..data.bad_rows import BadRows
from ..inputs import chat_renderer, encode_rows, read_rows
from ..loading import find_device, load_model_on, load_small_parts
from ..progress import note
from ..quality import Quality, measure_adapters
from .config import EvaluateConfig


@dataclass(frozen=True)
class Evaluation:
    """An adapter, and what its selections cost on the data, by the names of `caprese_distill.quality`."""

    adapter: Path
    adapters: Adapters
    quality: Mapping[str, Quality]
    data: Mapping[str, Any]
    seconds: float

    def record(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "adapter": str(self.adapter),
            "quality": {name: asdict(found) for name, found in self.quality.items()},
            "data": dict(self.data),
            "seconds": round(self.seconds, 1),
        }


def evaluate(config: EvaluateConfig, console: Console | None = None) -> Evaluation:
    """Measure the adapter of `config` on all of its samples.

    CapreseError for data, a model or settings that do not fit.
    """
    console, started = console or Console(quiet=True), time.monotonic()
    path = find_adapter(config.adapter)
    adapters = Adapters.load(path)
    bad_rows = BadRows(config.max_bad_rows)
    source = read_rows(config, bad_rows)
    device = find_device(config.device)
    for text in (str(source), *source.notes):
        note(console, text)
    model_config, tokenizer = load_small_parts(config.model)
    adapters.config.base_model.check_serves(BaseModelInfo.from_hf(model_config, config.model), f"adapter {path}")
    renderer = chat_renderer(config, model_config, tokenizer, console)
    samples = encode_rows(config, source, model_config, renderer, bad_rows, console, held_out=0)
    model = load_model_on(config.model, config.dtype, device).eval()
    quality = measure_adapters(model, adapters, samples, console)
    return Evaluation(path, adapters, quality, source.provenance, time.monotonic() - started)
