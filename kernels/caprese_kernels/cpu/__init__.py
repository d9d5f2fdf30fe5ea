"""C++ kernels for CPUs: AVX-512 (bfloat16 through AMX or vdpbf16ps where there are) or AVX2, compiled on first use.

A batch of up to GATHER_UP_TO tokens reads only the rows it needs (ff.cpp). A larger one needs nearly every row, and
arithmetic limits it: two matrix products over the same storage, z masked between them (products.cpp).
`reference` defines the functions; `library` raises Unavailable where the kernels cannot be compiled.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .. import reference
from ..errors import CapreseError
from ..packed import ACTIVATION_FUNCTIONS, CoreFF, PackedFF
from ..reference import cats_threshold, plan_layers
from .build import Unavailable, library

__all__ = [
    "NAME", "Unavailable", "cats_ff", "cats_observe", "cats_threshold", "core_ff", "dense_ff", "griffin_ff",
    "griffin_norms", "griffin_observe", "griffin_select", "library", "plan_layers", "prompt_ff", "read_memory",
]  # fmt: skip

NAME = "cpu"
# Measured on both paths, one selection a token, density .5. 1536 x 8960, two cores of an EPYC 9004, without AMX: 64
# tokens take as long gathered as masked. 896 x 4864, a core of a Xeon with AMX, processor time: float32 takes .51 of
# the time gathered at 4 tokens, .66 at 16, .90 at 64; bfloat16 .67 at 4, .76 at 8, 1.1 at 16, 2.9 at 64.
GATHER_UP_TO = 64  # tokens
GATHER_UP_TO_ON_AMX = 12  # tokens of bfloat16, also where they share selections or are a core's
CORE_GATHER_UP_TO = 64  # tokens of a core: `caprese bench kernels --sections core` measures both paths
SHARED_UNION = 0.6  # of F: up to this share, gathering wins for more tokens too, without AMX
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {name: i for i, name in enumerate(ACTIVATION_FUNCTIONS)}  # in the order of vector.h's enum

CorePath = Literal["kernel", "products"]
_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("gate", "up_plus", "down_plus", "gate_bias", "up_bias", "down_bias")),
        *((name, _int) for name in ("depth", "neurons", "rank")),
        *((name, ctypes.c_int32) for name in ("dtype", "activation")),
        ("scale", _pointer),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("x", "y")),
        *((name, _int) for name in ("tokens", "x_stride")),
        *((name, _pointer) for name in ("slots", "keep", "tau", "kept")),
    ]


def dense_ff(x: Tensor, ff: PackedFF, out: Tensor | None = None) -> Tensor:
    """As reference.dense_ff."""
    return (_gather if _are_few(x, GATHER_UP_TO) else _products)(x, ff, None, out)


def prompt_ff(x: Tensor, ff: PackedFF, observed: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As reference.prompt_ff. A token's bits do not depend on how its prompt is cut, nor on the batch."""
    z, gate = (x.new_empty(len(x), ff.num_neurons) if observed else None for _ in range(2))
    return _products(x, ff, None, None, z, gate), z, gate


def griffin_ff(
    x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor, row_plan: object = None, out: Tensor | None = None
) -> Tensor:
    """As reference.griffin_ff; each call finds the rows it needs itself."""
    return _sparse(x, ff, slots, out, keep=keep)


def core_ff(x: Tensor, ff: CoreFF, slots: Tensor, out: Tensor | None = None, path: CorePath | None = None) -> Tensor:
    """As reference.core_ff; `path` decides between our kernel and matrix products, by default the number of tokens."""
    if (path or ("kernel" if _are_few(x, CORE_GATHER_UP_TO) else "products")) == "kernel":
        return _gather(x, ff, slots, out)
    return _products(x, ff, slots, out)


def cats_ff(
    x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor, out: Tensor | None = None, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As reference.cats_ff."""
    counts = slots.new_zeros(len(x))
    y = _sparse(x, ff, slots, out, tau=tau, kept=counts)
    return y, reference.add_kept(kept, counts)


def _sparse(x: Tensor, ff: PackedFF, slots: Tensor, out: Tensor | None, **selections: Tensor) -> Tensor:
    if _are_few(x, GATHER_UP_TO) or (not _on_amx(x) and _share_rows(slots, ff, selections.get("keep"))):
        return _gather(x, ff, slots, out, **selections)
    return _products(x, ff, slots, out, **selections)


def _on_amx(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and bool(library().caprese_has_tiles())


def _are_few(x: Tensor, most: int) -> bool:
    """Whether gathering is faster for that many tokens whose rows have little in common; `most`: without AMX."""
    return len(x) <= (min(most, GATHER_UP_TO_ON_AMX) if _on_amx(x) else most)


def _share_rows(slots: Tensor, ff: PackedFF, keep: Tensor | None) -> bool:
    """Whether a large batch needs so few neurons that gathering wins: samples of a few prompts share selections."""
    if keep is None:
        return False
    union = keep[slots[slots >= 0].unique()].any(dim=0).sum()
    return int(union) <= SHARED_UNION * ff.num_neurons


def _gather(
    x: Tensor, ff: PackedFF | CoreFF, slots: Tensor | None, out: Tensor | None = None, **selections: Tensor
) -> Tensor:
    """y, reading only the rows that are needed. Without slots: every neuron, no low-rank rows."""
    x, y = _rows(x), x.new_zeros(x.shape) if out is None else out.zero_()
    library().caprese_ff(*described(x, ff, y, slots, **selections), torch.get_num_threads())
    return y


def _products(
    x: Tensor,
    ff: PackedFF | CoreFF,
    slots: Tensor | None,
    out: Tensor | None = None,
    z: Tensor | None = None,
    gate: Tensor | None = None,
    **selections: Tensor,
) -> Tensor:
    """y by two matrix products over all rows, z masked between them. Without slots: every neuron, no low-rank rows.

    `z` [T, F] (with slots [T, F + r]) and `gate` [T, F], if given, take what is computed on the way.
    """
    x, y = _rows(x), x.new_empty(x.shape) if out is None else out
    library().caprese_products(
        *described(x, ff, y, slots, **selections),
        *_address_and_stride(z),
        *_address_and_stride(gate),
        torch.get_num_threads(),
    )
    return y


def _address_and_stride(rows: Tensor | None) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return (_pointer(None), _int(0)) if rows is None else (_pointer(rows.data_ptr()), _int(rows.stride(0)))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _address(what: str, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    """The tensor's address, after checking the layout that the C++ code expects; None for None."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise CapreseError(
            what,
            expected=f"a contiguous tensor of {dtype} on cpu",
            found=f"{'a' if tensor.is_contiguous() else 'a strided'} tensor of {tensor.dtype} on {tensor.device}",
            fix="convert it first",
        )
    return tensor.data_ptr()


def _check_index(what: str, values: Tensor, size: int) -> None:
    """Raise CapreseError unless all values are from -1 to `size` - 1."""
    if len(values) and not (int(values.min()) >= -1 and int(values.max()) < size):
        raise CapreseError(
            what, expected=f"-1 to {size - 1}", found=f"{int(values.min())} to {int(values.max())}", fix="correct them"
        )


def _dtype(tensor: Tensor) -> int:
    if tensor.dtype not in DTYPES:
        raise CapreseError(
            "FF kernels for CPUs", expected="float32, bfloat16 or float16", found=str(tensor.dtype), fix="convert it"
        )
    return DTYPES[tensor.dtype]


def described(
    x: Tensor,
    ff: PackedFF | CoreFF,
    y: Tensor | None,
    slots: Tensor | None,
    keep: Tensor | None = None,
    tau: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[object, object]:
    """Pointers to block.h's Block and Batch; CapreseError for tensors that the code would misread."""
    dtype, table = ff.down_plus.dtype, tau if keep is None else keep
    if x.dtype != dtype or x.device.type != "cpu" or x.shape[1] != ff.hidden_size:
        raise CapreseError(
            "x",
            expected=f"[T, {ff.hidden_size}] of {dtype} on cpu",
            found=f"{list(x.shape)} of {x.dtype} on {x.device}",
            fix="convert it",
        )
    if slots is not None and table is not None:
        slots = slots.contiguous()
        _check_index("slots", slots, len(table))
        if len(slots) != len(x) or (keep is not None and keep.shape[1] != ff.num_neurons):
            raise CapreseError(
                "slots and selections",
                expected=f"a slot for each of {len(x)} tokens, {ff.num_neurons} neurons",
                found=f"{len(slots)} slots, a table {list(table.shape)}",
                fix="correct the shapes",
            )
    if not isinstance(ff.native, _Block):  # made once: making it takes as long as the rest of the call
        weights = (ff.gate, ff.up_plus, ff.down_plus, ff.gate_bias, ff.up_bias, ff.down_bias)
        ff.native = _Block(
            *(_address("packed weights", tensor, dtype) for tensor in weights),
            *(ff.hidden_size, ff.num_neurons, ff.rank, _dtype(x), ACTIVATIONS[ff.activation]),
            _address("scale of neurons", ff.scale, torch.float32),
        )
    batch = _Batch(
        *(x.data_ptr(), _address("y", y, dtype), len(x), x.stride(0), _address("slots", slots, torch.int64)),
        *(_address("keep", keep, torch.bool), _address("tau", tau, torch.float32), _address("kept", kept, torch.int64)),
    )
    batch.alive = slots  # a copy must outlive the call
    return ctypes.byref(ff.native), ctypes.byref(batch)


def griffin_norms(z: Tensor, scale: Tensor | None = None) -> Tensor:
    """As reference.griffin_norms."""
    z, norms = _rows(z), torch.empty(len(z))
    library().caprese_griffin_norms(
        *(_pointer(z.data_ptr()), _int(z.stride(0)), _int(len(z)), _int(z.shape[1]), _dtype(z)),
        *(_scale(scale, z.shape[1]), _pointer(norms.data_ptr()), torch.get_num_threads()),
    )
    return norms


def griffin_observe(
    z: Tensor,
    offsets: Tensor,
    slots: Tensor,
    statistic: Tensor,
    norms: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """As reference.griffin_observe; token by token, so a prompt's bits do not depend on how it is cut."""
    z = _rows(z)
    for begin, end, slot in _segments(offsets, slots, len(z), len(statistic)):
        library().caprese_griffin_observe(
            _pointer(z[begin:end].data_ptr()), _int(z.stride(0)), _int(end - begin), _int(z.shape[1]),
            _dtype(z), _scale(scale, z.shape[1]),
            _pointer(None if norms is None else _address("norms", norms[begin:end], torch.float32)),
            _pointer(_address("statistic", statistic[slot], torch.float32)), torch.get_num_threads(),
        )  # fmt: skip


def griffin_select(statistic: Tensor, k: int) -> Tensor:
    """As reference.griffin_select."""
    rows = statistic.reshape(-1, statistic.shape[-1]).contiguous()
    keep = torch.empty(rows.shape, dtype=torch.bool)
    for values, mask in zip(rows, keep, strict=True):
        at = _pointer(_address("statistic", values, torch.float32))
        library().caprese_griffin_select(at, _int(len(values)), _int(k), _pointer(mask.data_ptr()))
    return keep.view(statistic.shape)


def cats_observe(
    gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, histogram: Tensor, scale: Tensor | None = None
) -> None:
    """As reference.cats_observe."""
    gate = _rows(gate)
    for begin, end, slot in _segments(offsets, slots, len(gate), len(histogram)):
        library().caprese_cats_observe(
            _pointer(gate[begin:end].data_ptr()), _int(gate.stride(0)), _int(end - begin), _int(gate.shape[1]),
            _dtype(gate), ACTIVATIONS[activation], _scale(scale, gate.shape[1]),
            _pointer(_address("histogram", histogram[slot], torch.int64)), torch.get_num_threads(),
        )  # fmt: skip


def _scale(scale: Tensor | None, neurons: int) -> ctypes.c_void_p:
    """The address of the neurons' scale [F] float32; null for none."""
    if scale is not None and scale.shape != (neurons,):
        raise CapreseError(
            "scale of neurons", expected=f"shape [{neurons}]", found=str(list(scale.shape)), fix="give one a neuron"
        )
    return _pointer(_address("scale of neurons", scale, torch.float32))


def _segments(offsets: Tensor, slots: Tensor, rows: int, size: int) -> list[tuple[int, int, int]]:
    _check_index("offsets", offsets, rows + 1)
    _check_index("slots", slots, size)
    ends = zip(pairwise(offsets.tolist()), slots.tolist(), strict=True)
    return [(begin, end, slot) for (begin, end), slot in ends if slot >= 0 and end > begin]


def read_memory(tensor: Tensor) -> int:
    """Read every byte of a contiguous tensor with all threads, to measure bandwidth; returns the sum of its words."""
    library().caprese_read.restype = ctypes.c_uint64
    words = tensor.numel() * tensor.element_size() // 8
    return int(library().caprese_read(_pointer(tensor.data_ptr()), _int(words), torch.get_num_threads()))
