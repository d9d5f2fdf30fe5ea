"""One decode step of a published shape in plain torch: everything except the FF blocks is the same for every variant.

Weights are random, scaled so that activations stay of order one. They exist once: FF blocks are packed, with room for L
and R. Each request's KV cache is filled with random keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF, allocate

from ..kernels.floor import Weights
from .models import ARCHS

FeedForward = Callable[[int, Tensor], Tensor]  # (layer, x [B, D]) -> y [B, D]


@dataclass(frozen=True)
class DecodeDimensions:
    """What a step needs of a config.json, for Qwen 2's and Llama's layers, which differ in the biases of q, k and v."""

    layers: int
    hidden_size: int
    neurons: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    eps: float
    theta: float
    biased: bool

    @classmethod
    def of(cls, arch: str) -> DecodeDimensions:
        """Those of a shape of ARCHS. Raises CapreseError for an unknown one, or one with other layers."""
        if arch not in ARCHS:
            raise CapreseError(
                "--arch", expected=f"one of {', '.join(ARCHS)}", found=repr(arch), fix="choose one of these"
            )
        config = ARCHS[arch]
        if config["model_type"] not in ("qwen2", "llama"):
            raise CapreseError(
                "--arch",
                expected="a Qwen 2 or Llama shape, the only layers that this benchmark has",
                found=arch,
                fix="use `caprese bench latency`, which runs vLLM's layers",
            )
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            heads,
            config["num_key_value_heads"],
            config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
            config["rms_norm_eps"],
            config["rope_theta"],
            config["model_type"] == "qwen2",
        )

    @property
    def qkv(self) -> int:
        """Rows of the projection to q, k and v."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    def weights(self) -> Weights:
        """The sizes for the floor of a step, without the embedding, of which a step reads one row."""
        d, f = self.hidden_size, self.neurons
        attention = self.qkv * (d + self.biased) + self.heads * self.head_size * d
        total = self.layers * (attention + 3 * f * d + 2 * d) + d + self.vocabulary * d
        kv = 2 * self.layers * self.kv_heads * self.head_size
        return Weights(total, 0, 3 * f * d, f * d, self.layers, d, f, kv)


class DecodeModel:
    """A model whose `step(ff)` is a whole decode step with the FF blocks that `ff` computes."""

    def __init__(self, sizes: DecodeDimensions, rank: int, context: int, batch: int, device: str, dtype: torch.dtype):
        self.sizes, self.rank, self.device = sizes, rank, device
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            empty = torch.empty(shape, dtype=dtype, device=device)
            return empty.normal_(std=scale, generator=generator)

        d, f, size = sizes.hidden_size, sizes.neurons, sizes.head_size

        def rows(count: int, fan_in: int) -> Tensor:
            like = torch.empty(0, d, dtype=dtype, device=device)
            return allocate(count, like).normal_(std=fan_in**-0.5, generator=generator)

        layers = range(sizes.layers)
        self.qkv = [random(sizes.qkv, d, scale=d**-0.5) for _ in layers]
        self.qkv_bias = [random(sizes.qkv, scale=0.1) if sizes.biased else None for _ in layers]
        self.out = [random(d, sizes.heads * size, scale=d**-0.5) for _ in layers]
        self.blocks = [PackedFF(rows(2 * f + rank, d), rows(f + rank, f), "silu", rank) for _ in layers]
        self.norms = [torch.ones(d, dtype=dtype, device=device) for _ in range(2 * sizes.layers + 1)]
        self.head = random(sizes.vocabulary, d, scale=d**-0.5)
        shape = (batch, sizes.kv_heads, context, size)
        self.keys, self.values = ([random(*shape) for _ in layers] for _ in range(2))
        self.x = random(batch, d)
        frequency = sizes.theta ** (-torch.arange(0, size, 2, device=device).float() / size)
        angle = torch.cat([frequency, frequency]) * (context - 1)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        # On a GPU the small operations are fused, as by vLLM's compiler; every variant uses the same code.
        fused: Any = torch.compile if device == "cuda" else lambda function: function
        self.add_norm, self.rotate, self.gated = fused(_add_norm), fused(_rotate), fused(_gated)

    def plain(self, layer: int) -> PackedFF:
        """The block without L and R: shorter views of the same storage."""
        whole, f = self.blocks[layer], self.sizes.neurons
        return PackedFF(whole.gate_up_plus[: 2 * f], whole.down_plus[:f], whole.activation)

    def step(self, ff: FeedForward, seen: list[Tensor] | None = None) -> Tensor:
        """The next tokens, [B] int64; the input [B, D] of every FF block is appended to `seen`."""
        sizes, batch = self.sizes, len(self.x)
        x, rest = self.add_norm(self.x, torch.zeros_like(self.x), self.norms[0], sizes.eps)
        for layer in range(sizes.layers):
            qkv = F.linear(x, self.qkv[layer], self.qkv_bias[layer]).view(batch, -1, sizes.head_size)
            q, k, v = qkv.split([sizes.heads, sizes.kv_heads, sizes.kv_heads], dim=1)
            q, k = self.rotate(q, self.cos, self.sin), self.rotate(k, self.cos, self.sin)
            self.keys[layer][:, :, -1], self.values[layer][:, :, -1] = k, v
            y = F.scaled_dot_product_attention(q[:, :, None], self.keys[layer], self.values[layer], enable_gqa=True)
            y = F.linear(y.flatten(1), self.out[layer])
            x, rest = self.add_norm(y, rest, self.norms[2 * layer + 1], sizes.eps)
            if seen is not None:
                seen.append(x)
            x, rest = self.add_norm(ff(layer, x), rest, self.norms[2 * layer + 2], sizes.eps)
        return F.linear(x, self.head).argmax(dim=1)


def _add_norm(x: Tensor, rest: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + rest, x + rest)."""
    rest = x + rest
    wide = rest.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(rest.dtype) * weight, rest


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [B, H, hd] at one position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
