"""Parameters of a model, counted exactly from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Count:
    """A model's parameters; tied embeddings count once."""

    name: str
    family: str
    hidden_size: int
    layers: int
    total: int
    ff: int  # of one FF block
    gate: int  # of its gate projection, which CATS must read whole


def count(name: str, hf_config: Any, family: str = "") -> Count:
    """Exact: the transformers model itself is made, without memory for its weights. CapreseError for no gated FF."""
    import torch
    from transformers import AutoModelForCausalLM

    from caprese_distill.blocks import find_blocks
    from caprese_kernels.config import BaseModelInfo

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    info = BaseModelInfo.from_hf(hf_config, name)
    blocks = find_blocks(model, info, range(info.num_hidden_layers))
    block: Any = blocks[0]
    ff, gate = (sum(p.numel() for p in part.parameters()) for part in (block, block.gate_proj))
    total = sum(p.numel() for p in model.parameters())
    return Count(name, family or type(hf_config).__name__, info.hidden_size, info.num_hidden_layers, total, ff, gate)


def cut(count: Count, method: str, layers: int, rank: int, density: float) -> float:
    """Share of the model's parameters that a generated token no longer needs where `layers` blocks are sparse, net of
    L [D, r] and R [r, D] of each.

    GRIFFIN drops (1 - density) of a block; CATS must read the gate projection first, and drops that share of the rest.
    """
    spared = (1 - density) * (count.ff if method == "griffin" else count.ff - count.gate)
    return layers * (spared - 2 * count.hidden_size * rank) / count.total
