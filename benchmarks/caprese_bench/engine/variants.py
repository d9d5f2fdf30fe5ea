"""The variants that `caprese bench latency` and `caprese bench decode` compare: the columns of the paper's table 4.

Imports neither pydantic nor vLLM: `decode` runs where only torch is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from caprese_kernels.errors import CapreseError

from ..results.lists import names

if TYPE_CHECKING:
    from caprese_kernels.config import MethodName


@dataclass(frozen=True)
class Variant:
    """A sparse method with its correction: L and R, LoRA, or none. Full has no method.

    `layers` None makes the method's default layers sparse: the first half for GRIFFIN, all for CATS.
    """

    id: str
    label: str
    method: MethodName | None = None
    correction: Literal["lora", "caprese"] | None = None
    layers: Literal["all"] | None = None

    def sparse_layers(self, layers: int) -> range:
        """Indices of its sparse layers in a model of `layers` layers."""
        if self.method is None:
            return range(0)
        return range(layers // 2 if self.method == "griffin" and self.layers is None else layers)


VARIANTS = {
    variant.id: variant
    for variant in (
        Variant("full", "Full"),
        Variant("griffin", "GRIFFIN", "griffin"),
        Variant("lora", "LoRA", "griffin", "lora"),
        Variant("caprese", "Caprese (GRIFFIN)", "griffin", "caprese"),
        Variant("caprese-all", "Caprese (GRIFFIN, all layers)", "griffin", "caprese", "all"),
        Variant("cats", "CATS", "cats"),
        Variant("caprese-cats", "Caprese (CATS)", "cats", "caprese"),
    )
}


def choose_variants(text: str) -> list[Variant]:
    """The variants named in --variants, in the order of VARIANTS.

    Raises CapreseError for an unknown name, or if Full is not among them.
    """
    chosen = names("--variants", text, VARIANTS)
    if "full" not in chosen:
        raise CapreseError(
            "--variants", expected="full among them, to which all ratios are", found=text, fix="add full"
        )
    return [variant for name, variant in VARIANTS.items() if name in chosen]
