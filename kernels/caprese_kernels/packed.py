"""Packed weights: one feed-forward block stored neuron by neuron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CapreseError

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
}


@dataclass
class PackedFF:
    """FF(x) = (act(x W_g) * (x W_1)) W_2 (paper, eq. 1-2), one neuron being D contiguous values in each matrix.

    gate       [F, D]      rows of W_g; None for a block without a gate, whose g = z = act(x W_1)
    up_plus    [F + r, D]  rows of W_1, then L^T
    down_plus  [F + r, D]  rows of W_2 (neuron-major), then R
    *_bias     gate and up [F], down [D]; None where the block has none
    r may be 0: the plain sparse block without a low-rank layer.
    """

    gate: Tensor | None
    up_plus: Tensor
    down_plus: Tensor
    act: Activation
    rank: int = 0
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (self.num_neurons, self.hidden_size)
        if self.down_plus.shape != self.up_plus.shape:
            raise CapreseError(
                "packed weights", expected=f"down_plus of up_plus's shape {tuple(self.up_plus.shape)}",
                found=str(tuple(self.down_plus.shape)), fix="pack W_2 neuron-major: one row of D values a neuron",
            )  # fmt: skip
        if self.gate is not None and self.gate.shape != shape:
            raise CapreseError(
                "packed weights",
                expected=f"gate of shape {shape}",
                found=str(tuple(self.gate.shape)),
                fix="check F and r",
            )

    @property
    def hidden_size(self) -> int:  # D
        return self.up_plus.shape[1]

    @property
    def num_neurons(self) -> int:  # F
        return self.up_plus.shape[0] - self.rank

    @property
    def num_matrices(self) -> int:
        return 2 if self.gate is None else 3

    @classmethod
    def pack(
        cls,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        act: Activation,
        left: Tensor | None = None,
        right: Tensor | None = None,
        **biases: Tensor | None,
    ) -> PackedFF:
        """From weights as torch.nn.Linear holds them: gate, up [F, D], down [D, F]; and L [D, r], R [r, D]. Copies."""
        if (left is None) != (right is None):
            raise CapreseError(
                "packed weights",
                expected="both of L and R, or neither",
                found="one of them",
                fix="give the other one too",
            )
        up_plus, down_plus = [up], [down.t()]
        if left is not None and right is not None:
            up_plus.append(left.t().to(up))
            down_plus.append(right.to(down))
        rank = 0 if left is None else left.shape[1]
        return cls(gate, torch.cat(up_plus), torch.cat(down_plus).contiguous(), act, rank, **biases)
