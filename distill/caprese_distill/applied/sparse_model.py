"""`apply`: hooks on a Hugging Face model that make its generated tokens sparse, by the definitions that serving uses.

A pass over an empty KV cache begins prompts: it runs the original FF blocks and takes each row's statistic. A pass over
one position a row that continues a cache is a generated token: it keeps the neurons that its row's prompt selected,
plus x L R (paper, eq. 9 and 10). Neurons are masked, not skipped: results are serving's, time and memory are not.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from caprese_kernels.adapters import Adapters, find_adapter
from caprese_kernels.config import BaseModelInfo, CapreseConfig, Method, layer_spans, resolve
from caprese_kernels.errors import CapreseError

from ..blocks import find_blocks
from ..placement import device_of
from ..selection import Selectors, selectors_of
from . import refusals
from .prompts import Prompts

SETTINGS = ("method", "density", "layers", "score", "prior", "core")  # the method's, of --caprese-config
_applied: WeakSet[nn.Module] = WeakSet()  # decoders that have hooks


def apply(model: Any, adapter: str | os.PathLike[str] | None = None, **settings: Any) -> SparseModel:
    """Make the model's `generate` run as serving does with this adapter: prompts dense, generated tokens sparse.

        with apply(model, "adapters.safetensors"):
            model.generate(**inputs)

    `model` is a causal language model of transformers with gated FF blocks. `adapter` is a file, a directory or a Hub
    id (owner/name); without one `method="griffin"` or `"cats"` is the plain method. `settings` (method, density,
    layers, score, prior, core) go before the adapter's, as in `--caprese-config`. The model stays sparse until the
    returned object's `remove()`, or the end of its `with`. CapreseError for an adapter that does not fit the model.
    """
    refusals.check_settings(settings, SETTINGS)
    given = settings if adapter is None else {"weights": os.fspath(adapter)} | settings
    config = CapreseConfig.parse(given, "apply()")
    adapters = None
    if config.weights is not None:
        path = find_adapter(config.weights)
        adapters = Adapters.load(path)
        config = config.model_copy(update={"weights": str(path)})
    text_config = model.config.get_text_config()
    names = model.config.architectures or [type(model).__name__]
    info = BaseModelInfo.from_hf(text_config, model.config.name_or_path or type(model).__name__, names)
    method, remarks = resolve(config, adapters.config if adapters else None, info)
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    blocks = find_blocks(model, info, method.layers)
    if model.get_decoder() in _applied:
        raise CapreseError(
            "apply()", expected="a model without Caprese", found="one that has it", fix="call its remove() first"
        )
    return SparseModel(model, blocks, method, adapters)


@dataclass
class _Pass:
    """One pass through the decoder."""

    prompts: Prompts
    counted: Tensor  # bool [B, S]: positions that are not padding
    selections: Mapping[int, Tensor] | None  # of a generated token; None: prompt tokens
    seen: set[int] = field(default_factory=set)  # layers whose neurons were observed or masked


@dataclass(frozen=True)
class _Placed:
    """Selectors, L and R on their layers' devices, L and R in their layers' dtypes."""

    places: Mapping[int, tuple[torch.device, torch.dtype]]
    selectors: Selectors
    low_rank: Mapping[int, tuple[Tensor, Tensor]]


class SparseModel:
    """A model whose generated tokens are sparse, until `remove`. A context manager; made by `apply`."""

    def __init__(self, model: Any, blocks: Mapping[int, Any], method: Method, adapters: Adapters | None):
        self.model, self.method = model, method
        self._blocks, self._adapters, self._decoder = blocks, adapters, model.get_decoder()
        self._placed = self._place()
        self._prompts: WeakKeyDictionary[Any, Prompts] = WeakKeyDictionary()  # by their KV cache
        self._pass: _Pass | None = None
        self._handles: list[Any] = []
        for i, block in blocks.items():
            self._handles += self._hooks(i, block)
        self._handles += [
            self._decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._decoder.register_forward_hook(self._end, with_kwargs=True),
        ]
        self._wrap_generate()
        _applied.add(self._decoder)

    def __str__(self) -> str:
        of, spans = len(self._decoder.layers), layer_spans(self.method.layers)
        return f"Caprese: {len(self._blocks)} of {of} FF blocks replaced: {self.method}, layers {spans}"

    def __enter__(self) -> SparseModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the model. Its weights were never changed; a second call does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        del self.model.generate
        if self._own_generate is not None:
            self.model.generate = self._own_generate
        _applied.discard(self._decoder)

    def _wrap_generate(self) -> None:
        generate, self._own_generate = self.model.generate, vars(self.model).get("generate")

        @wraps(generate)
        def checked(*args: Any, **kwargs: Any) -> Any:
            refusals.check_generate(self.model, generate, args, kwargs)
            return generate(*args, **kwargs)

        self.model.generate = checked

    def _places(self) -> dict[int, tuple[torch.device, torch.dtype]]:
        return {i: (device_of(block), block.down_proj.weight.dtype) for i, block in self._blocks.items()}

    def _place(self) -> _Placed:
        """Everything that a layer needs, where the layer is now."""
        places = self._places()
        selectors = selectors_of(self._blocks, self.method, self._adapters.prior if self._adapters else None)
        low_rank = {}
        if self._adapters is not None and self.method.rank:
            left, right = self._adapters.left, self._adapters.right
            low_rank = {i: (left[i].to(*place), right[i].to(*place)) for i, place in places.items()}
        return _Placed(places, selectors, low_rank)

    # -- one pass through the decoder --------------------------------------------------------------------------------

    @torch.no_grad()
    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pass = None
        inputs = _arguments(decoder, args, kwargs)
        cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
        if cache is None and inputs.get("use_cache") is False:
            return  # no token can follow
        ids = inputs.get("input_ids")
        embedded = inputs["inputs_embeds"] if ids is None else ids
        rows, width = embedded.shape[:2]
        refusals.check_cache(cache)
        length = 0 if cache is None else int(cache.get_seq_length())
        refusals.check_mask(mask, rows, length + width)
        if length == 0:
            prompts = Prompts(rows)
            if self._places() != self._placed.places:
                self._placed = self._place()
        else:
            prompts = self._continued(cache, rows, length, width)
        counted = torch.ones(rows, width, dtype=torch.bool) if mask is None else mask[:, -width:].bool()
        generated = length > 0 and width == 1
        self._pass = _Pass(prompts, counted, prompts.select(self._placed.selectors) if generated else None)

    def _continued(self, cache: Any, rows: int, length: int, width: int) -> Prompts:
        """The prompts that the cache belongs to; CapreseError for one whose rows or positions are others."""
        prompts = self._prompts.get(cache)
        if prompts is None:
            refusals.refuse_cache("a cache that was filled elsewhere")
        elif (prompts.rows, prompts.length) != (rows, length):
            ours = f"{prompts.rows} rows of {prompts.length} positions were seen"
            refusals.refuse_cache(f"{rows} rows of {length} positions, where {ours}")
        elif prompts.selections is not None and width > 1:
            refusals.refuse_cache(f"{width} positions at once after generated tokens")
        assert prompts is not None
        return prompts

    def _end(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        current, self._pass = self._pass, None
        if current is None:
            return
        missed = sorted(set(self._blocks) - current.seen)
        if missed:
            raise CapreseError(
                f"FF block of layer {missed[0]}",
                expected="its modules to be called",
                found="none of them was: another implementation replaced the block's",
                fix="load the model without use_kernels or such patches",
            )
        current.prompts.end_pass(current.counted)
        cache = _arguments(decoder, args, kwargs).get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is not None:
            self._prompts[cache] = current.prompts

    # -- one FF block ------------------------------------------------------------------------------------------------

    def _hooks(self, layer: int, block: Any) -> list[Any]:
        kept: dict[str, Tensor] = {}

        def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept["x"] = args[0]

        def keep_activation(_: nn.Module, __: object, output: Tensor) -> None:
            kept["g"] = output

        def correct(_: nn.Module, __: object, y: Tensor) -> Tensor | None:
            x = kept["x"]
            kept.clear()
            if self._pass is None or self._pass.selections is None or layer not in self._placed.low_rank:
                return None
            left, right = self._placed.low_rank[layer]
            return y + x @ left @ right

        handles = [
            block.register_forward_pre_hook(keep_input),
            block.down_proj.register_forward_pre_hook(partial(self._observe_or_drop, layer, kept)),
            block.register_forward_hook(correct),
        ]
        if self.method.name == "cats":
            handles.append(block.act_fn.register_forward_hook(keep_activation))
        return handles

    def _observe_or_drop(
        self, layer: int, kept: Mapping[str, Tensor], _: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor] | None:
        """Prompt tokens: add z [B, S, F] to the statistic. Generated tokens: z [B, 1, F] without dropped neurons."""
        if self._pass is None:
            return None
        self._pass.seen.add(layer)
        z, g, selector = args[0], kept.get("g"), self._placed.selectors[layer]
        if self._pass.selections is None:
            with torch.no_grad():
                self._pass.prompts.observe(selector, layer, g, z, self._pass.counted)
            return None
        keep = selector.keeps(self._pass.selections[layer], None if g is None else g[:, 0])
        return (torch.where(keep[:, None], z, 0),)


def _arguments(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the decoder's forward by name."""
    return dict(inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments)
