"""What `caprese bench decode` sets side by side."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """`half`: sparse in the first half of the layers, else in all. `added`: L and R, or LoRA's A and B."""

    label: str
    method: str | None = None
    half: bool = False
    added: str | None = None


VARIANTS = {
    "full": Variant("Full"),
    "griffin": Variant("GRIFFIN", "griffin", True),
    "lora": Variant("LoRA", "griffin", True, "lora"),
    "caprese": Variant("Caprese (GRIFFIN)", "griffin", True, "caprese"),
    "caprese-all": Variant("Caprese (GRIFFIN, all layers)", "griffin", False, "caprese"),
    "cats": Variant("CATS", "cats"),
    "caprese-cats": Variant("Caprese (CATS)", "cats", False, "caprese"),
}
