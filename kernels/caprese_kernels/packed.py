"""Packed weights: one feed-forward block stored neuron by neuron."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field

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


def allocate(rows: int, like: Tensor) -> Tensor:
    """Uninitialized storage [rows, D] of `like`'s dtype and device; on a CPU in huge pages, where Linux has them.

    Each scattered row touches its own page. With pages of 4 KiB, translating their addresses takes a tenth of the time
    (8 to 16 tokens, Qwen 2.5 1.5B's shape, two cores of an EPYC 9004).
    """
    storage = like.new_empty(rows, like.shape[1])
    if storage.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (storage.data_ptr() + storage.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:  # advice: a kernel without huge pages ignores it
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return storage


@dataclass
class PackedFF:
    """FF(x) = (act(x W_g) * (x W_1)) W_2 (paper, eq. 1-2), one neuron being D contiguous values in each matrix.

    gate_up_plus  [2F + r, D]  rows of W_g, of W_1, then L^T: one storage, so that many tokens are one matrix product;
                               [F + r, D] for a block without a gate, whose g = z = act(x W_1)
    down_plus     [F + r, D]   rows of W_2 (neuron-major), then R
    activation                 a key of ACTIVATION_FUNCTIONS
    gate_up_bias  [2F] or [F]  and down_bias [D]; None where the block has none
    scale         [F] float32  factors of CATS's magnitudes: |g_j| scale_j is compared with tau; None: |g_j|
    r may be 0: the plain sparse block without a low-rank layer.

    Views: gate [F, D] (None without a gate), up_plus [F + r, D], and their biases [F].
    """

    gate_up_plus: Tensor
    down_plus: Tensor
    activation: str
    rank: int = 0
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    scale: Tensor | None = None
    gate: Tensor | None = field(init=False)
    up_plus: Tensor = field(init=False)
    gate_bias: Tensor | None = field(init=False, default=None)
    up_bias: Tensor | None = field(init=False)
    native: object = field(init=False, default=None, repr=False, compare=False)  # a backend's description of the above

    def __post_init__(self) -> None:
        neurons, extra = self.num_neurons, self.gate_up_plus.shape[0] - self.down_plus.shape[0]
        if extra not in (0, neurons) or self.down_plus.shape[1] != self.hidden_size:
            raise CapreseError(
                "packed weights",
                expected=f"down_plus [F + {self.rank}, D], and gate_up_plus as long or F rows longer",
                found=f"{list(self.down_plus.shape)} and {list(self.gate_up_plus.shape)}",
                fix="pack W_2 neuron-major, one row of D values a neuron, and check F and r",
            )
        tensors = [self.gate_up_plus, self.down_plus, self.gate_up_bias, self.down_bias]
        kinds = {(str(t.dtype), str(t.device)) for t in tensors if t is not None}
        if len(kinds) > 1 or not all(t is None or t.is_contiguous() for t in tensors):
            raise CapreseError(
                "packed weights",
                expected="contiguous tensors of one type on one device",
                found=", ".join(" on ".join(kind) for kind in sorted(kinds)) + (" " if len(kinds) > 1 else ", strided"),
                fix="convert them first",
            )
        self.gate = self.gate_up_plus[:neurons] if extra else None
        self.up_plus = self.gate_up_plus[extra:]
        self.up_bias = self.gate_up_bias
        if self.gate_up_bias is not None and extra:
            self.gate_bias, self.up_bias = self.gate_up_bias.split(neurons)

    def permute(self, order: Tensor) -> None:
        """Put neuron order[j] in place j, in the storage they are in; `order` [F] int64 is a permutation.

        One matrix at a time: the transient is the largest matrix's copy.
        """
        neurons = self.num_neurons
        for rows in (self.gate, self.up_plus[:neurons], self.down_plus[:neurons], self.gate_bias, self.up_bias):
            if rows is not None:
                rows.copy_(rows[order])
        if self.scale is not None:
            self.scale.copy_(self.scale[order])

    def core(self, count: int) -> CoreFF:
        """The last `count` neurons, with L and R behind them: views of the same storage."""
        first = self.num_neurons - count
        return CoreFF(
            None if self.gate is None else self.gate[first:],
            self.up_plus[first:],
            self.down_plus[first:],
            self.activation,
            self.rank,
            None if self.gate_bias is None else self.gate_bias[first:],
            None if self.up_bias is None else self.up_bias[first:],
            self.down_bias,
        )

    def without_low_rank(self) -> PackedFF:
        """The same neurons, without L, R and the output's bias: what a core leaves to the tail. Views."""
        inputs = len(self.gate_up_plus) - self.rank
        parts = (self.gate_up_plus[:inputs], self.down_plus[: self.num_neurons])
        return PackedFF(*parts, self.activation, 0, self.gate_up_bias)

    @property
    def act(self) -> Activation:
        """The activation function."""
        return ACTIVATION_FUNCTIONS[self.activation]

    @property
    def hidden_size(self) -> int:  # D
        return self.gate_up_plus.shape[1]

    @property
    def num_neurons(self) -> int:  # F
        return self.down_plus.shape[0] - self.rank

    @property
    def num_matrices(self) -> int:
        """Weight matrices of [F, D]: 3, or 2 without a gate."""
        return 2 if self.gate is None else 3

    @classmethod
    def pack(
        cls,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        activation: str,
        left: Tensor | None = None,
        right: Tensor | None = None,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> PackedFF:
        """Copy weights as torch.nn.Linear holds them: gate, up [F, D], down [D, F]; and L [D, r], R [r, D].

        L and R take the dtype of `up`. Raises CapreseError for shapes that do not fit, or L without R.
        """
        pairs = [("L and R", left, right)]
        if gate is not None:
            pairs.append(("the biases of gate and up", gate_bias, up_bias))
        for names, one, other in pairs:
            if (one is None) != (other is None):
                raise CapreseError(
                    "packed weights",
                    expected=f"both of {names}, or neither",
                    found="one of them",
                    fix="give the other one too",
                )
        if gate is not None and gate.shape != up.shape:
            raise CapreseError(
                "packed weights",
                expected=f"gate of shape {tuple(up.shape)}",
                found=str(tuple(gate.shape)),
                fix="check F and D",
            )
        parts, down_parts = [up] if gate is None else [gate, up], [down.t()]
        if left is not None and right is not None:
            parts.append(left.t().to(up))
            down_parts.append(right.to(down))
        rows, down_rows = (torch.cat(each, out=allocate(sum(map(len, each)), up)) for each in (parts, down_parts))
        bias = up_bias if gate_bias is None or up_bias is None else torch.cat([gate_bias, up_bias])
        rank = 0 if left is None else left.shape[1]
        return cls(rows, down_rows, activation, rank, bias, down_bias)


@dataclass
class CoreFF:
    """c neurons that every generated token keeps, and the low-rank rows behind them: one dense block for any batch.

    y = [act(x gate^T + b_g) * (x up^T + b_u), x L] [down; R] + b, with up_plus [c + r, D] and down_plus [c + r, D]
    contiguous; gate [c, D], None without a gate (g = z = act(x up^T + b_u)).
    """

    gate: Tensor | None
    up_plus: Tensor
    down_plus: Tensor
    activation: str
    rank: int
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    scale: Tensor | None = field(init=False, default=None)  # a core is of GRIFFIN
    native: object = field(init=False, default=None, repr=False, compare=False)

    @property
    def act(self) -> Activation:
        return ACTIVATION_FUNCTIONS[self.activation]

    @property
    def hidden_size(self) -> int:  # D
        return self.up_plus.shape[1]

    @property
    def num_neurons(self) -> int:  # c
        return self.up_plus.shape[0] - self.rank
