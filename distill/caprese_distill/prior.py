"""The prior: each neuron's share of the statistic of the data's responses, under the original model.

p_j = sum_i z~_ij^2 / sum_j sum_i z~_ij^2 over the response tokens i of all samples, z~ as the method's score has it; a
float32 vector of F values for each sparse layer. It adds up over samples, batches and shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.reference import griffin_statistic

from . import checkpoint
from .blocks import find_blocks, truncated_decoder
from .data.batches import BATCH_TOKENS, Batch, pack
from .data.samples import Sample
from .placement import device_of, return_freed
from .selection import neuron_norms


@dataclass
class PriorSums:
    """The statistic's sums over response tokens, float64 [F] a layer, up to batch number `batches`."""

    sums: dict[int, Tensor]
    batches: int = 0

    @classmethod
    def zeros(cls, devices: Mapping[int, torch.device], neurons: int) -> PriorSums:
        """`devices` has the device of each layer's sums."""
        return cls({i: torch.zeros(neurons, dtype=torch.float64, device=device) for i, device in devices.items()})

    @property
    def position(self) -> str:
        return f"batch {self.batches} of the prior"

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"sum.{i}": total for i, total in self.sums.items()}, {"batches": self.batches}

    def resume(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        for i, total in self.sums.items():
            total.copy_(tensors[f"sum.{i}"])
        self.batches = progress["batches"]

    def priors(self) -> dict[int, Tensor]:
        """p [F] float32 of each layer, on the CPU. CapreseError for a layer whose statistic is zero or not finite."""
        found = {}
        for i, total in self.sums.items():
            if not 0 < float(total.sum()) < float("inf"):
                raise CapreseError(
                    f"prior of layer {i}",
                    expected="response tokens with finite activations other than zero",
                    found="none, or NaN among them",
                    fix="give more data, or another --dtype",
                )
            found[i] = (total / total.sum()).float().cpu()
        return found


def prior_identity(model: Any, samples: Sequence[Sample], method: Method) -> dict[str, Any]:
    """All that the sums depend on: a checkpoint with another identity is not resumed."""
    device = device_of(model.get_input_embeddings())
    versions = {"dtype": str(model.dtype), "device": str(device), "torch": torch.__version__}
    settings = {"score": method.score, "layers": list(method.layers), "batch": BATCH_TOKENS[device.type]}
    return checkpoint.fingerprint(model, samples, **settings, **versions)


@torch.no_grad()
def collect_priors(
    model: Any,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    resume: Path | None = None,
    console: Console | None = None,
) -> dict[int, Tensor]:
    """p [F] float32 of each layer, from one pass of the original model over the samples' responses.

    With `resume`, a killed pass with the same model, samples and settings continues from that file, to the same bits.
    """
    devices = {i: device_of(block) for i, block in find_blocks(model, info, method.layers).items()}
    state, batches = PriorSums.zeros(devices, info.intermediate_size), prior_batches(model, samples)
    identity = prior_identity(model, samples, method) if resume else {}
    with (
        checkpoint.checkpointed("priors", state, batches, resume, identity, console) as record,
        feeding_priors(model, info, method) as feed,
    ):
        for batch in batches[state.batches :]:
            feed(batch, state)
            record(1)
    return state.priors()


def prior_batches(model: Any, samples: Sequence[Sample]) -> list[Batch]:
    """The batches of `collect_priors`."""
    return pack(samples, device_of(model.get_input_embeddings()))


@contextlib.contextmanager
def feeding_priors(model: Any, info: BaseModelInfo, method: Method) -> Iterator[Callable[[Batch, PriorSums], None]]:
    """Within it, a function that runs the original model over a batch and adds its response tokens to the sums."""
    blocks = find_blocks(model, info, method.layers)
    scales = {i: neuron_norms(block) if method.weighted else None for i, block in blocks.items()}
    current: list[tuple[Batch, PriorSums]] = []

    def adder(layer: int) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            batch, state = current[0]
            z = args[0].flatten(0, -2)[batch.rows().to(args[0].device)]
            state.sums[layer] += griffin_statistic(z, scale=scales[layer])

        return add

    downs: dict[int, Any] = {i: block.down_proj for i, block in blocks.items()}
    handles = [down.register_forward_pre_hook(adder(i)) for i, down in downs.items()]

    def feed(batch: Batch, state: PriorSums) -> None:
        current[:] = [(batch, state)]
        decoder(input_ids=batch.ids(), use_cache=False)
        return_freed()

    try:
        with truncated_decoder(model, method.layers) as decoder:
            yield feed
    finally:
        for handle in handles:
            handle.remove()
