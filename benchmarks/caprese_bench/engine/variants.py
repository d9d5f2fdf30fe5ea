"""The variants that `caprese bench latency` and `caprese bench decode` compare: the columns of the paper's table 4, and
selections with a core.

Imports neither pydantic nor vLLM: `decode` runs where only torch is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from caprese_kernels.errors import CapreseError

from ..results.lists import names

if TYPE_CHECKING:
    from caprese_kernels.config import MethodName

    from ..results.configured import ConfiguredMethod

PRIOR, TAILED = 0.5, 0.8  # the prior's weight; the core's share of a selection that has a tail


@dataclass(frozen=True)
class Variant:
    """A sparse method with its correction: L and R, LoRA, or none. Full has no method.

    `layers` None makes the method's default layers sparse: the first half for GRIFFIN, all for CATS. With `core` the
    selection is by the weighted score and a prior of weight PRIOR, and that share of it is every request's.
    `configured` says all of this itself: a --config of the user's.
    """

    id: str
    label: str
    method: MethodName | None = None
    correction: Literal["lora", "caprese"] | None = None
    layers: Literal["all"] | None = None
    core: float | None = None
    configured: ConfiguredMethod | None = None

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
        Variant("core", "Core", "griffin", core=1.0),
        Variant("core-tail", "Core and tail", "griffin", core=TAILED),
        Variant("core-all", "Core (all layers)", "griffin", None, "all", 1.0),
        Variant("core-tail-all", "Core and tail (all layers)", "griffin", None, "all", TAILED),
        Variant("caprese-core", "Caprese (core)", "griffin", "caprese", None, 1.0),
        Variant("caprese-core-all", "Caprese (core, all layers)", "griffin", "caprese", "all", 1.0),
    )
}
PAPER = "full,griffin,lora,caprese,cats,caprese-cats"  # table 4


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
