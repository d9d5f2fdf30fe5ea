"""What a selection costs: the sparse model's next-token distribution on given responses, beside the original's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from caprese_kernels.adapters import Adapters
from caprese_kernels.config import Method, method_of

from .blocks import find_blocks
from .data.samples import Sample
from .head import LOGIT_ROWS, Head
from .placement import device_of
from .progress import progress_bar
from .selection import Selectors, selectors_of

MAX_HELD_OUT = 16  # samples whose quality is measured, of those held out
# What is measured of an adapter, by the names in its header.
PAPER, SELECTION, ADAPTER = "paper", "selection", "adapter"


@dataclass(frozen=True)
class Quality:
    """Means over `tokens` response tokens, of the distribution of the token after each."""

    kl: float  # KL(original || sparse), nats
    agreement: float  # share of tokens whose most likely successor is the same
    tokens: int


@dataclass
class _Sums:
    """What `Quality` is the mean of."""

    kl: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def add(self, original: Tensor, sparse: Tensor) -> None:
        """Add log-probabilities [N, V] of N tokens, float32."""
        self.kl += float((original.exp() * (original - sparse)).sum(dtype=torch.float64))
        self.agreed += int((original.argmax(dim=1) == sparse.argmax(dim=1)).sum())
        self.tokens += len(original)

    def means(self) -> Quality:
        return Quality(self.kl / self.tokens, self.agreed / self.tokens, self.tokens)


@dataclass(frozen=True)
class SparseLayers:
    """What generated tokens run through: the layers' selections, and L, R of those that have them."""

    selectors: Selectors
    left: Mapping[int, Tensor] = field(default_factory=dict)
    right: Mapping[int, Tensor] = field(default_factory=dict)


def measure_adapters(
    model: Any, adapters: Adapters, samples: Sequence[Sample], console: Console | None = None
) -> dict[str, Quality]:
    """Quality of the adapters' selection without L and R (SELECTION) and with them (ADAPTER, unless rank 0), and of
    each prompt's own selection by the paper's method at the same density (PAPER)."""
    method = method_of(adapters.config)
    blocks = find_blocks(model, adapters.config.base_model, method.layers)
    selectors = selectors_of(blocks, method, adapters.prior)
    plain = selectors_of(blocks, Method(method.name, method.density, method.layers, 0))
    variants = {PAPER: SparseLayers(plain), SELECTION: SparseLayers(selectors)}
    if method.rank:
        variants[ADAPTER] = SparseLayers(selectors, adapters.left, adapters.right)
    with progress_bar(console, "samples/s") as bar:
        line = bar.add_task("quality", total=len(samples))
        return measure(model, blocks, samples, variants, lambda: bar.advance(line))


@torch.no_grad()
def measure(
    model: Any,
    blocks: Mapping[int, nn.Module],
    samples: Sequence[Sample],
    variants: Mapping[str, SparseLayers],
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Quality]:
    """Quality of each variant on samples with given responses.

    Teacher-forced: prompt tokens run the original blocks, response tokens the neurons that the sample's prompt selects,
    plus x L R; `variants` may leave layers dense. `advance` is called after each sample.
    """
    sums, head = {name: _Sums() for name in variants}, Head(model)
    variants = {name: _placed(blocks, variant, model.dtype) for name, variant in variants.items()}
    for sample in samples:
        chosen: dict[str, dict[int, Tensor]] = {name: {} for name in variants}
        with _hooked(blocks, partial(_choose, variants, chosen, sample.prompt_length)):
            original = _hidden(model, sample)
        hidden: dict[str, tuple[Tensor, ...]] = {}
        for name, variant in variants.items():
            sparse = {i: blocks[i] for i in variant.selectors}
            drop = partial(_drop, variant.selectors, chosen[name], sample.prompt_length)
            with _hooked(sparse, drop), _corrected(sparse, variant, sample.prompt_length):
                hidden[name] = _hidden(model, sample).split(LOGIT_ROWS)
        for part, rows in enumerate(original.split(LOGIT_ROWS)):
            likely = F.log_softmax(head(rows), dim=-1)
            for name, parts in hidden.items():
                sums[name].add(likely, F.log_softmax(head(parts[part]), dim=-1))
        advance()
    return {name: each.means() for name, each in sums.items()}


def _placed(blocks: Mapping[int, nn.Module], variant: SparseLayers, dtype: torch.dtype) -> SparseLayers:
    """L and R on their layers' devices, in the model's dtype."""
    left, right = ({i: part[i].to(device_of(blocks[i]), dtype) for i in part} for part in (variant.left, variant.right))
    return replace(variant, left=left, right=right)


def _hidden(model: Any, sample: Sample) -> Tensor:
    """The last hidden state of the sample's response tokens, [N, D]."""
    ids = sample.ids.long()[None].to(device_of(model.get_input_embeddings()))
    hidden: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    return hidden[sample.prompt_length :]


def _choose(
    variants: Mapping[str, SparseLayers],
    chosen: Mapping[str, dict[int, Tensor]],
    length: int,
    layer: int,
    g: Tensor,
    z: Tensor,
) -> None:
    """Store what the prompt selects in this layer, by variant; g and z [T, F] themselves are not kept."""
    for name, variant in variants.items():
        if layer in variant.selectors:
            chosen[name][layer] = variant.selectors[layer].from_prompt(g[:length], z[:length])


def _drop(
    selectors: Selectors, selections: Mapping[int, Tensor], length: int, layer: int, g: Tensor, z: Tensor
) -> Tensor:
    """z [T, F] with zeros for the neurons that response tokens do not keep."""
    selection = selections[layer]
    keep = selectors[layer].keeps(selection.expand(len(z) - length, *selection.shape), g[length:])
    return torch.cat([z[:length], torch.where(keep, z[length:], 0)])


@contextlib.contextmanager
def _hooked(blocks: Mapping[int, nn.Module], see: Callable[[int, Tensor, Tensor], Any]) -> Iterator[None]:
    """Call see(layer, g [T, F], z [T, F]) for each block of one sample's pass; what it returns takes z's place."""
    with _removed(hook for i, block in blocks.items() for hook in _hooks(i, block, see)):
        yield


def _hooks(layer: int, block: Any, see: Callable[[int, Tensor, Tensor], Any]) -> list[Any]:
    seen: dict[str, Tensor] = {}

    def keep_g(_: nn.Module, __: object, g: Tensor) -> None:
        seen["g"] = g[0]

    def pass_z(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        changed = see(layer, seen.pop("g"), args[0][0])
        return None if changed is None else (changed[None],)

    return [block.act_fn.register_forward_hook(keep_g), block.down_proj.register_forward_pre_hook(pass_z)]


@contextlib.contextmanager
def _corrected(blocks: Mapping[int, nn.Module], variant: SparseLayers, length: int) -> Iterator[None]:
    """Add x L R to the blocks' outputs of one sample's response tokens, those from `length` on."""

    def adder(layer: int) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            low = args[0][:, length:] @ variant.left[layer] @ variant.right[layer]
            return torch.cat([y[:, :length], y[:, length:] + low], dim=1)

        return add

    with _removed(block.register_forward_hook(adder(i)) for i, block in blocks.items() if i in variant.left):
        yield


@contextlib.contextmanager
def _removed(handles: Iterator[Any]) -> Iterator[None]:
    """Remove the hooks at the end."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()
