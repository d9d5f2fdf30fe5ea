"""Batches of samples of similar length: what every stage feeds to the model.

Shapes: B samples of up to T tokens, of which N are generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .samples import Sample, split

# Tokens of a forward pass, padding included (a longer sample runs alone), by type of device: enough to fill the device,
# and on a CPU few enough that a checkpoint comes every minute.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right. Attention is causal, so no real token sees padding and no mask is needed."""

    samples: Sequence[Sample]
    held_out: bool
    device: torch.device | str = "cpu"

    @property
    def num_tokens(self) -> int:
        return sum(len(s.ids) for s in self.samples)

    @property
    def num_padded(self) -> int:
        """B * T: the tokens that the model computes, padding included."""
        return len(self.samples) * max(len(s.ids) for s in self.samples)

    def ids(self) -> Tensor:
        """[B, T] int64, padded with token 0."""
        ids = nn.utils.rnn.pad_sequence([s.ids for s in self.samples], batch_first=True)
        return ids.long().to(self.device)

    def owners(self) -> Tensor:
        """The sample of every generated token that is fed: its index in the batch, [N] int64."""
        counts = torch.tensor([s.num_rows for s in self.samples])
        return torch.repeat_interleave(torch.arange(len(self.samples)), counts).to(self.device)

    def rows(self) -> Tensor:
        """Indices of those tokens among the B * T flattened ones, [N] int64."""
        width = max(len(s.ids) for s in self.samples)
        ranges = [torch.arange(s.prompt_length, len(s.ids)) + b * width for b, s in enumerate(self.samples)]
        return torch.cat(ranges).to(self.device)


def make_batches(samples: Sequence[Sample], device: torch.device) -> list[Batch]:
    """Batches of the samples to fit, then of those held out.

    The longest come first, so that a batch that does not fit into memory fails at once.
    """
    fit, held_out = split(samples)
    return [*pack(fit, device), *pack(held_out, device, held_out=True)]


def pack(samples: Sequence[Sample], device: torch.device, held_out: bool = False) -> list[Batch]:
    """Batches of samples of similar length, up to BATCH_TOKENS each, the longest samples first."""
    batches: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda s: -len(s.ids)):
        if batches[-1] and len(batches[-1][0].ids) * (len(batches[-1]) + 1) > BATCH_TOKENS[device.type]:
            batches.append([])
        batches[-1].append(sample)
    return [Batch(batch, held_out, device) for batch in batches]
