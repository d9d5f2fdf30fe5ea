"""The ranks that share one FF block under tensor parallelism, and what they exchange."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `size`: it holds the block's neurons [rank F / size, (rank + 1) F / size).

    Each method but `share` is a collective when size > 1: every rank calls it in the same order. It adds in the order
    of ranks, so all ranks get the same bits, and a request's bits do not depend on its place in the batch.
    """

    rank: int = 0
    size: int = 1

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's `values`: [size, *values.shape]."""
        # Viewed as float32: the bits are only copied, and vLLM's exchange among CPU processes refuses integers.
        bits = values.contiguous()[None].view(torch.float32)
        return tensor_model_parallel_all_gather(bits, dim=0).view(values.dtype)

    def norms(self, own: Tensor) -> Tensor:
        """||z_i|| over all neurons, float32 [P], from the norms over this rank's: the root of the sum of squares."""
        return functools.reduce(torch.hypot, self.gather(own))

    def counts(self, own: Tensor) -> Tensor:
        """The sum of every rank's histograms [n, NUM_MAGNITUDES] int64."""
        return own if self.size == 1 else self.gather(own).sum(dim=0)

    def share(self, low_rank: Tensor, rank: int) -> Tensor:
        """This rank's rows of L^T or R [r, D], split into `size` parts of `rank` rows; the last may be shorter."""
        return low_rank[self.rank * rank : (self.rank + 1) * rank]
