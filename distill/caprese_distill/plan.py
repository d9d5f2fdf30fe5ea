"""What a distillation will do and take, before it begins; and what it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from .data.samples import split
from .end_to_end.train import steps_of
from .memory import Memory, peak_memory
from .work import Work


@dataclass(frozen=True)
class DistillationPlan:
    """What a distillation will do, from its data and the model's shapes; no weight is read for it."""

    work: Work
    model_parameters: int
    rows: int  # of the data; those without a sample were skipped
    memory: Memory

    @property
    def adapter_parameters(self) -> int:
        """The number of values in all L [D, r] and R [r, D]."""
        return 2 * self.work.info.hidden_size * self.work.method.rank * len(self.work.method.layers)

    @property
    def held_out(self) -> int:
        """The number of samples held out."""
        return len(split(self.work.samples)[1])

    @property
    def prompt_tokens(self) -> int:
        return sum(s.prompt_length for s in self.work.samples)

    @property
    def response_tokens(self) -> int:
        return sum(s.num_rows for s in self.work.samples)

    @property
    def steps(self) -> int:
        """Optimizer steps of the end-to-end stage; 0 without it."""
        recipe = self.work.recipe
        return len(steps_of(split(self.work.samples)[0], recipe)) if recipe else 0

    def record(self) -> dict[str, Any]:
        """The plan as JSON values."""
        work, memory = self.work, self.memory
        recipe = work.recipe
        return {
            "model": work.info.name_or_path,
            "architecture": work.info.architecture,
            "model_parameters": self.model_parameters,
            "method": work.method.name,
            "density": work.method.density,
            "densities": None if work.method.densities is None else list(work.method.densities),
            "score": work.method.score,
            "prior": work.method.prior,
            "core": work.method.core,
            "rank": work.method.rank,
            "layers": list(work.method.layers),
            "adapter_parameters": self.adapter_parameters,
            "solver": "adam" if work.adam else "closed-form",
            "weighting": "gradient" if work.weighting else "none",
            "stage": "end-to-end" if recipe else "layer-wise",
            "samples": len(work.samples),
            "samples_held_out": self.held_out,
            "rows_skipped": self.rows - len(work.samples),
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.response_tokens,
            "steps": self.steps,
            "learning_rate": recipe.learning_rate if recipe else None,
            "peak_bytes": memory.peak,
            "host_peak_bytes": memory.host_peak,
            "disk_bytes": memory.disk,
            "adapter_bytes": memory.output,
        }


@dataclass(frozen=True)
class ResourceUsage:
    """What a run took, beside its estimate. Sizes are by place: "host", and "device" for a GPU."""

    seconds: float
    estimated_seconds: float
    peak_bytes: dict[str, int]
    estimated_bytes: dict[str, int]


@dataclass(frozen=True)
class Estimate:
    """Memory and time of one process on one device."""

    memory: Memory
    seconds: dict[str, float]  # by stage, of the remaining work
    resumed: bool  # whether an earlier run did a part
    device: torch.device
    started: float = field(default_factory=time.monotonic)

    def usage(self) -> ResourceUsage:
        """What was taken since the estimate was made."""
        estimated = {"host": self.memory.host_peak}
        if self.device.type == "cuda":
            estimated["device"] = self.memory.peak
        return ResourceUsage(
            seconds=round(time.monotonic() - self.started, 1),
            estimated_seconds=round(sum(self.seconds.values()), 1),
            peak_bytes=peak_memory(self.device),
            estimated_bytes=estimated,
        )
