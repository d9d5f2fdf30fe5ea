"""What a distillation returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprese_kernels.adapters import Adapters

from .plan import ResourceUsage
from .quality import Quality


@dataclass(frozen=True)
class LayerErrors:
    """A layer's errors on held-out samples after the layer-wise stage, squared norms (paper, eq. 7).

    error_before  ||E||^2 / ||FF||^2          error_after  ||E - X L R||^2 / ||FF||^2
    remaining     ||E - X L R||^2 / ||E||^2   remaining_fit  the same on the samples fitted
    """

    ridge: float | None  # of the closed form
    error_before: float
    error_after: float
    remaining: float
    remaining_fit: float


@dataclass(frozen=True)
class Result:
    """An adapter that was written, its files and its figures."""

    adapter: Path
    card: Path | None  # None: files with the card's names exist, and are not this adapter's
    responses: Path | None  # the generated responses, for a run with `generate`
    adapters: Adapters

    @property
    def errors(self) -> dict[int, LayerErrors]:
        """By layer, what the layer-wise stage left."""
        recorded = self.adapters.config.training["errors"]
        return {int(layer): LayerErrors(**errors) for layer, errors in recorded.items()}

    @property
    def held_out_errors(self) -> list[float]:
        """||M - M_student||^2 / ||M||^2 (eq. 8) before the first epoch and after each; empty without that stage."""
        return list(self.adapters.config.training.get("end_to_end", {}).get("held_out_errors", []))

    @property
    def kept_epoch(self) -> int:
        """The epoch whose L and R these are: 0 before the first, where training end to end did not help."""
        return int(self.adapters.config.training["end_to_end"]["kept_epoch"])

    @property
    def held_out_kl(self) -> list[float]:
        """KL(original || student), nats a token, at the same times; empty for the loss of hidden states."""
        return list(self.adapters.config.training.get("end_to_end", {}).get("held_out_kl", []))

    @property
    def quality(self) -> dict[str, Quality]:
        """The next token on held-out samples: "paper" (each prompt's own selection) and "selection" without L and R,
        "adapter" with them."""
        return {name: Quality(**recorded) for name, recorded in self.adapters.config.training["quality"].items()}

    @property
    def resources(self) -> ResourceUsage | None:
        """Memory and time; None for several processes or devices, which are not estimated."""
        recorded = self.adapters.config.training["resources"]
        return ResourceUsage(**recorded) if recorded else None

    def record(self) -> dict[str, Any]:
        """The result as JSON values: the files, and the adapter file's configuration with all figures in `training`."""
        return {
            "adapter": str(self.adapter),
            "card": str(self.card) if self.card else None,
            "responses": str(self.responses) if self.responses else None,
            "bytes": self.adapter.stat().st_size,
            "dtype": str(self.adapters.dtype).removeprefix("torch."),
            "parameters": self.adapters.num_parameters,
            "config": self.adapters.config.model_dump(mode="json"),
        }
