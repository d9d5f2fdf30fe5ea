"""The method for one model, and the FF blocks that it makes sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from torch import nn

from caprese_kernels.config import (
    ACTIVATIONS,
    AdapterConfig,
    BaseModelInfo,
    CapreseConfig,
    LayerChoice,
    Method,
    resolve,
)
from caprese_kernels.errors import CapreseError


def resolve_method(
    hf_config: Any, name: str, method: str, density: float, rank: int, layers: LayerChoice | None = None
) -> tuple[BaseModelInfo, Method]:
    """The base model's dimensions, and the method with its layers resolved for that model.

    CapreseError for a rank, density or layers that do not fit the model, and for a model without gated FF blocks.
    """
    try:
        info = BaseModelInfo.from_hf(hf_config, name)
    except (AttributeError, ValidationError):
        found = (getattr(hf_config, "architectures", None) or [type(hf_config).__name__])[0]
        raise _unsupported(f"model {name}", found) from None
    asked = CapreseConfig.parse({"method": method, "density": density, "layers": layers}, "caprese distill")
    resolved, _ = resolve(asked, None, info)
    if not 1 <= rank <= info.hidden_size:
        raise CapreseError(
            "rank", expected=f"1 to {info.hidden_size}, the hidden size", found=str(rank), fix="give another --rank"
        )
    if info.hidden_act not in ACTIVATIONS.values():
        raise _unsupported(f"model {name}", f"activation {info.hidden_act}")
    return info, replace(resolved, rank=rank)


def adapter_config(info: BaseModelInfo, method: Method, training: dict[str, Any]) -> AdapterConfig:
    """The configuration of an adapter for that model and method; `caprese_kernels.config.method_of` is its inverse."""
    return AdapterConfig(
        base_model=info,
        method=method.name,
        density=method.density,
        rank=method.rank,
        score=method.score,
        prior=method.prior,
        core=method.core,
        layers=list(method.layers),
        densities=None if method.densities is None else list(method.densities),
        training=training,
    )


def find_blocks(model: Any, info: BaseModelInfo, layers: Sequence[int]) -> dict[int, nn.Module]:
    """The FF block of each layer; CapreseError names the first one without gate_proj, up_proj, down_proj and act_fn."""
    decoder_layers = getattr(model.get_decoder(), "layers", [])
    shape = (info.hidden_size, info.intermediate_size)
    blocks = {}
    for i in layers:
        block: Any = getattr(decoder_layers[i], "mlp", None) if i < len(decoder_layers) else None
        parts = [getattr(block, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        linear = all(isinstance(part, nn.Linear) and part.weight.is_floating_point() for part in parts)
        if not (linear and isinstance(getattr(block, "act_fn", None), nn.Module)):
            found = "no module mlp" if block is None else type(block).__name__
            raise _unsupported(f"FF block of layer {i}", f"{found} of {info.architecture}")
        if tuple(block.down_proj.weight.shape) != shape:
            raise _unsupported(f"FF block of layer {i}", f"down_proj of shape {tuple(block.down_proj.weight.shape)}")
        blocks[i] = block
    return blocks


@contextmanager
def truncated_decoder(model: Any, layers: Sequence[int]) -> Iterator[nn.Module]:
    """The decoder up to the last of `layers`, for sums that later layers do not change."""
    decoder = model.get_decoder()
    whole = decoder.layers
    decoder.layers = whole[: max(layers) + 1]
    try:
        yield decoder
    finally:
        decoder.layers = whole


def _unsupported(where: str, found: str) -> CapreseError:
    return CapreseError(
        where,
        expected="a gated FF block (gate_proj, up_proj, down_proj, act_fn), as Llama, Qwen2, Qwen3 and Gemma 2 have",
        found=found,
        fix="use a model of that kind",
    )
