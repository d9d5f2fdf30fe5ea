"""Exact parameter counts of models from their configurations, and the share that sparse decoding spares (figure 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .families import FAMILIES, ModelDimensions


@dataclass(frozen=True)
class ParameterCount:
    """A model's parameters; tied embeddings count once."""

    name: str
    family: str
    hidden_size: int
    layers: int
    total: int
    ff: int  # of one FF block
    gate: int  # of its gate projection, which CATS must read whole


def count_published(family: str, name: str) -> ParameterCount:
    """The parameters of a model of `families.FAMILIES`, by the formula of its architecture; needs no transformers."""
    d: ModelDimensions = FAMILIES[family].models[name]
    heads, kv_heads = d.num_attention_heads * d.head_dim, d.num_key_value_heads * d.head_dim
    gate = d.hidden_size * d.intermediate_size
    attention = 2 * d.hidden_size * (heads + kv_heads)  # q and o, k and v
    if FAMILIES[family].model_type == "qwen2":
        attention += heads + 2 * kv_heads  # biases of q, k and v
    norms = (4 if FAMILIES[family].model_type == "gemma2" else 2) * d.hidden_size
    embeddings = d.vocab_size * d.hidden_size * (1 if d.tie_word_embeddings else 2)
    total = embeddings + d.num_hidden_layers * (attention + 3 * gate + norms) + d.hidden_size
    return ParameterCount(name, family, d.hidden_size, d.num_hidden_layers, total, 3 * gate, gate)


def count(name: str, hf_config: Any, family: str = "") -> ParameterCount:
    """The parameters of any model: transformers builds it, without memory for its weights.

    Raises CapreseError for a model without gated FF blocks.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from caprese_distill.blocks import find_blocks
    from caprese_kernels.config import BaseModelInfo

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    info = BaseModelInfo.from_hf(hf_config, name, [type(model).__name__])
    blocks = find_blocks(model, info, range(info.num_hidden_layers))
    block: Any = blocks[0]
    ff, gate = (sum(p.numel() for p in part.parameters()) for part in (block, block.gate_proj))
    total = sum(p.numel() for p in model.parameters())
    return ParameterCount(
        name, family or type(hf_config).__name__, info.hidden_size, info.num_hidden_layers, total, ff, gate
    )


def spared_share(count: ParameterCount, method: str, layers: int, rank: int, density: float) -> float:
    """Share of the model's parameters that a generated token no longer needs if `layers` blocks are sparse.

    GRIFFIN drops (1 - density) of a block's parameters; CATS must read the gate projection first, and drops that share
    of the rest. The 2 D r values of L [D, r] and R [r, D] of each block are subtracted.
    """
    spared = (1 - density) * (count.ff if method == "griffin" else count.ff - count.gate)
    return layers * (spared - 2 * count.hidden_size * rank) / count.total
