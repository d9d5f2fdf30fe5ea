"""One interface to the FF kernels, and the choice of an implementation."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .packed import PackedFF


class Backend(Protocol):
    """What each implementation offers; a module is one. `reference` documents and defines every function.

    Rows are tokens. `slots` int64 names each token's (or segment's) row of a table, -1 for padding. Tables are
    `keep` [S, F] bool and `tau` [S] float32 of selections, `statistic` [S, F] float32 and `histogram`
    [S, NUM_MAGNITUDES] int64 of prompts in progress. Same inputs give the same bits; nothing is synchronized.
    """

    NAME: str

    def dense_ff(self, x: Tensor, ff: PackedFF) -> Tensor: ...
    def griffin_ff(self, x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor: ...
    def cats_ff(self, x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]: ...
    def griffin_observe(self, z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor) -> None: ...
    def griffin_select(self, statistic: Tensor, k: int) -> Tensor: ...
    def cats_observe(
        self, gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, histogram: Tensor
    ) -> None: ...
    def cats_threshold(self, histogram: Tensor, density: float) -> Tensor: ...
