"""Settings of the demo's adapters.

Density and layers were chosen on problems of the training split, such that GRIFFIN loses enough accuracy for a recovery
to be visible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RANK = 48


@dataclass(frozen=True)
class Settings:
    """Density and sparse layers, and the learning rates: of L and R layer-wise by Adam and end to end, and of LoRA."""

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
