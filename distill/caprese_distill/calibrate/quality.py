"""What a selection costs: the sparse model's next-token distribution on given responses, beside the original's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caprese_kernels.selection import LayerSelector

from ..data.samples import Sample
from ..placement import device_of

Selectors = Mapping[int, LayerSelector]  # by layer


@dataclass
class Quality:
    """Means over response tokens, of the distribution of the token after each."""

    kl_sum: float = 0.0  # KL(original || sparse), nats
    agreed: int = 0  # tokens whose most likely successor is the same
    tokens: int = 0
    per_sample: list[tuple[float, float]] = field(default_factory=list)  # means of KL and agreement, for errors

    @property
    def kl(self) -> float:
        return self.kl_sum / self.tokens

    @property
    def agreement(self) -> float:
        return self.agreed / self.tokens

    def add(self, original: Tensor, sparse: Tensor) -> None:
        """Add one sample's log-probabilities [N, V], float32."""
        kl = (original.exp() * (original - sparse)).sum(dim=1)
        agreed = original.argmax(dim=1) == sparse.argmax(dim=1)
        self.kl_sum += float(kl.sum())
        self.agreed += int(agreed.sum())
        self.tokens += len(kl)
        self.per_sample.append((float(kl.mean()), float(agreed.float().mean())))


@torch.no_grad()
def measure(
    model: Any,
    blocks: Mapping[int, nn.Module],
    samples: Sequence[Sample],
    variants: Mapping[str, Selectors],
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Quality]:
    """Quality of each variant's selections, without L and R, on samples with given responses.

    Teacher-forced: prompt tokens run the original blocks, response tokens the neurons that the sample's prompt selects;
    `variants` may leave layers dense. `advance` is called after each sample.
    """
    found = {name: Quality() for name in variants}
    for sample in samples:
        ids = sample.ids.long()[None].to(device_of(model.get_input_embeddings()))
        rows = torch.arange(sample.prompt_length, len(sample.ids))
        prompts: dict[int, tuple[Tensor, Tensor]] = {}
        with _hooked(blocks, partial(_remember, prompts, sample.prompt_length)):
            original = _log_probabilities(model, ids, rows)
        for name, selectors in variants.items():
            selections = {i: selector.from_prompt(*prompts[i]) for i, selector in selectors.items()}
            sparse = {i: blocks[i] for i in selectors}
            with _hooked(sparse, partial(_drop, selectors, selections, sample.prompt_length)):
                found[name].add(original, _log_probabilities(model, ids, rows))
        advance()
    return found


def _remember(prompts: dict[int, tuple[Tensor, Tensor]], length: int, layer: int, g: Tensor, z: Tensor) -> None:
    prompts[layer] = g[:length], z[:length]


def _drop(
    selectors: Selectors, selections: Mapping[int, Tensor], length: int, layer: int, g: Tensor, z: Tensor
) -> Tensor:
    """z [T, F] with zeros for the neurons that response tokens do not keep."""
    selection = selections[layer]
    keep = selectors[layer].keeps(selection.expand(len(z) - length, *selection.shape), g[length:])
    return torch.cat([z[:length], torch.where(keep, z[length:], 0)])


def _log_probabilities(model: Any, ids: Tensor, rows: Tensor) -> Tensor:
    """Of the token after each of `rows`, float32 [N, V]."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0]
    return F.log_softmax(logits.float(), dim=-1)


@contextlib.contextmanager
def _hooked(blocks: Mapping[int, nn.Module], see: Callable[[int, Tensor, Tensor], Any]) -> Iterator[None]:
    """Call see(layer, g [T, F], z [T, F]) for each block of one sample's pass; what it returns takes z's place."""
    handles = []
    for i, block in blocks.items():
        handles += _hooks(i, block, see)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(layer: int, block: Any, see: Callable[[int, Tensor, Tensor], Any]) -> list[Any]:
    seen: dict[str, Tensor] = {}

    def keep_g(_: nn.Module, __: object, g: Tensor) -> None:
        seen["g"] = g[0]

    def pass_z(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        changed = see(layer, seen.pop("g"), args[0][0])
        return None if changed is None else (changed[None],)

    return [block.act_fn.register_forward_hook(keep_g), block.down_proj.register_forward_pre_hook(pass_z)]
