"""The floor of a decode step: the bytes that it must read, which the memory's bandwidth turns into a least time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Weights:
    """The sizes of a model that decide what a decode step reads, in values. Tied embeddings count once."""

    total: int  # parameters
    lookup: int  # the embedding, unless it is also the head: a token reads one row of it, which is not counted
    ff: int  # of one FF block
    gate: int  # of its gate projection
    layers: int
    hidden_size: int
    neurons: int  # of one FF block
    kv: int  # of one token in the KV cache, all layers

    @classmethod
    def of(cls, hf_config: Any) -> Weights:
        """Exact for any model with gated FF blocks: transformers builds it, without memory for its weights."""
        from ..paper.counts import count

        counted = count("model", hf_config)
        head = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
        return cls(
            total=counted.total,
            lookup=0 if hf_config.tie_word_embeddings else hf_config.vocab_size * hf_config.hidden_size,
            ff=counted.ff,
            gate=counted.gate,
            layers=counted.layers,
            hidden_size=counted.hidden_size,
            neurons=hf_config.intermediate_size,
            kv=2 * counted.layers * hf_config.num_key_value_heads * head,
        )


def step_bytes(
    weights: Weights,
    method: str | None = None,
    sparse_layers: int = 0,
    kept: float = 1.0,
    added: int = 0,
    context: float = 0,
    batch: int = 1,
    itemsize: int = 2,
) -> float:
    """Bytes that one step of `batch` requests reads: every weight that it needs once, and each request's KV cache.

        itemsize (total - lookup - sparse_layers (spared - added) + batch context kv)

    GRIFFIN spares (1 - kept) of each sparse layer's FF block, where `kept` is the share of neurons in the union of the
    batch's selections: a core counts once, whatever the batch, and the tails beside it as far as they differ. CATS
    spares that share of W_1 and W_2 and reads the whole gate. `added` is the number of values in a sparse layer's
    correction: 2 D r of L and R. `context` is the number of tokens in a request's KV cache, on average over the
    generated tokens. Activations are far below 1% and left out.
    """
    values = _weights_needed(weights, method, sparse_layers, kept, added) + batch * context * weights.kv
    return itemsize * values


def step_flops(
    weights: Weights, method: str | None = None, sparse_layers: int = 0, kept: float = 1.0, added: int = 0
) -> float:
    """Floating-point operations of one token with the weights that it needs: 2 a weight. Attention's are left out.

    As in `step_bytes`, but `kept` is the share of neurons that the token itself keeps: what many requests at once cost,
    when arithmetic and no longer memory sets the time.
    """
    return 2 * _weights_needed(weights, method, sparse_layers, kept, added)


def _weights_needed(weights: Weights, method: str | None, sparse_layers: int, kept: float, added: int) -> float:
    spared = {None: 0, "griffin": weights.ff, "cats": weights.ff - weights.gate}[method] * (1 - kept)
    return weights.total - weights.lookup - sparse_layers * (spared - added)
