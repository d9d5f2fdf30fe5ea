"""What a batch of prompts leaves behind, row by row, for the tokens that are generated after it.

Shapes: B rows of S positions; F neurons. Padded positions count for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from caprese_kernels.errors import CapreseError
from caprese_kernels.reference import CatsStatistic, griffin_observe, magnitudes
from caprese_kernels.selection import LayerSelector

from ..selection import Selectors


class LayerStatistics:
    """The statistic of each row's prompt at one layer; adds up over the passes that a prompt is cut into."""

    def __init__(self, selector: LayerSelector, rows: int):
        self.selector = selector
        self.squares: Tensor | None = None  # GRIFFIN's s^2, float32 [B, F]
        self.magnitudes = [CatsStatistic(0, torch.float32, selector.scale) for _ in range(rows)]

    def add(self, g: Tensor | None, z: Tensor, counted: Tensor) -> None:
        """Add the positions in `counted`, bool [B, S], of g (CATS) and z [B, S, F]."""
        counted = counted.to(z.device)
        if self.selector.method.name == "cats":
            assert g is not None
            self.magnitudes = [
                _extended(statistic, g[row, counted[row]]) for row, statistic in enumerate(self.magnitudes)
            ]
            return
        if self.squares is None:
            self.squares = torch.zeros(len(z), z.shape[-1], device=z.device)
        if self.selector.method.needs_statistic:
            offsets = torch.tensor([0, *accumulate(counted.sum(dim=1).tolist())])
            griffin_observe(z[counted], offsets, torch.arange(len(z)), self.squares, scale=self.selector.scale)

    def select(self) -> Tensor:
        """What the rows select: GRIFFIN's masks [B, F] bool, or CATS's thresholds [B] float32."""
        if self.squares is not None:
            return self.selector.select(self.squares)
        density = self.selector.method.density
        return torch.stack([statistic.threshold(density) for statistic in self.magnitudes])


@dataclass
class Prompts:
    """A batch of prompts, and what its rows selected; it lives as long as its KV cache."""

    rows: int
    length: int = 0  # positions in the cache, padding and generated tokens included
    tokens: Tensor | None = None  # prompt tokens of each row, int64 [B]
    statistics: dict[int, LayerStatistics] = field(default_factory=dict)
    selections: Mapping[int, Tensor] | None = None  # by layer, once a token is generated

    def observe(self, selector: LayerSelector, layer: int, g: Tensor | None, z: Tensor, counted: Tensor) -> None:
        """Add a pass's positions at one layer."""
        if layer not in self.statistics:
            self.statistics[layer] = LayerStatistics(selector, self.rows)
        self.statistics[layer].add(g, z, counted)

    def end_pass(self, counted: Tensor) -> None:
        """The pass over the positions in `counted`, bool [B, S], is done."""
        tokens = counted.sum(dim=1)
        self.tokens = tokens if self.tokens is None else self.tokens + tokens
        self.length += counted.shape[1]

    def select(self, selectors: Selectors) -> Mapping[int, Tensor]:
        """The selections, made at the first generated token. CapreseError for a row without a prompt token."""
        if self.selections is None:
            assert self.tokens is not None
            if not self.tokens.all():
                raise CapreseError(
                    "prompts",
                    expected="a token in every row",
                    found=f"only padding in row {int((self.tokens == 0).nonzero()[0])}",
                    fix="correct attention_mask",
                )
            self.selections = {i: self.statistics[i].select() for i in selectors}
            self.statistics = {}
        return self.selections


def _extended(statistic: CatsStatistic, g: Tensor) -> CatsStatistic:
    """The statistic with the tokens of g [T, F] added, as if it had been begun with all of them.

    Only a whole prompt's length says whether its magnitudes are kept or counted.
    """
    longer = CatsStatistic(statistic.num_values + g.numel(), g.dtype)
    for values in (*statistic.values, magnitudes(g, statistic.scale)):
        longer.add(values)
    if statistic.histogram is not None:
        assert longer.histogram is not None, "a longer prompt is counted, too"
        longer.histogram = longer.histogram + statistic.histogram
    longer.scale = statistic.scale
    return longer
