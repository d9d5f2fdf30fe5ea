"""Sums over generated tokens that determine eq. 7, streamed from forward passes; no activation is stored.

Shapes: B samples of up to T tokens, N generated tokens of a batch; D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caprese_kernels.errors import CapreseError
from caprese_kernels.selection import LayerSelector

from ..data.batches import Batch
from ..data.samples import Sample
from ..placement import aligned
from ..selection import Selectors, fixed_neurons, keep_mask, select


@dataclass
class Moments:
    """Sums over rows x [D] (FF inputs) with error e [D] and FF output y [D]; they add up over batches and shards.

    float64, because thousands of batches are added. Each batch's own products are float32: its
    relative rounding, 6e-8 of sqrt(X'X_ii X'X_jj) at entry ij, is random over batches and far below
    the noise of the data, and float64 products would take up to 64 times longer on a GPU.
    """

    xx: Tensor  # X'X [D, D]
    xe: Tensor  # X'E [D, D]
    ee: Tensor  # tr(E'E) []
    yy: Tensor  # tr(Y'Y) []
    rows: Tensor  # [] int64

    @classmethod
    def zeros(cls, depth: int, device: torch.device | str = "cpu") -> Moments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(depth, depth), zeros(depth, depth), zeros(), zeros(), zeros().long())

    def add(self, x: Tensor, e: Tensor, y: Tensor) -> None:
        """Add N rows in place: x, e, y [N, D] of any floating dtype."""
        x, e = x.float(), e.float()
        self.xx += x.t() @ x
        self.xe += x.t() @ e
        self.ee += e.square().sum(dtype=torch.float64)
        self.yy += y.float().square().sum(dtype=torch.float64)
        self.rows += len(x)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def products(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """tr(R' L' X'E) and ||X L R||^2 = tr(R' L' X'X L R), for L [D, r] and R [r, D] in float64."""
        cross = ((left.t() @ self.xe) * right).sum()
        square = ((left.t() @ self.xx @ left) * (right @ right.t())).sum()
        return cross, square

    def error(self, left: Tensor, right: Tensor) -> float:
        """||E - X L R||^2 = tr(E'E) - 2 tr(R' L' X'E) + ||X L R||^2, for L [D, r] and R [r, D] in float64."""
        cross, square = self.products(left, right)
        return max(float(self.ee - 2 * cross + square), 0.0)  # a tiny difference may round below zero


class Sink(Protocol):
    """Takes a layer's rows: FF inputs x, errors e and FF outputs y, all [N, D]; `Moments` is one."""

    def add(self, x: Tensor, e: Tensor, y: Tensor) -> None: ...


class Observer:
    """Watches FF blocks (`gate_proj`, `up_proj`, `down_proj`, `act_fn`) and gives their rows to sinks.

    x is the block's input, g its activation's output, z its down projection's input and y its
    output, all as the model itself computes them. E = FF(x) - FF_sparse(x) is the dropped neurons'
    part, (1 - keep) z W_2, taken as one product: the difference of two rounded outputs would be noise. Where all tokens
    drop the same neurons, it is the product with those rows of W_2 alone.
    """

    def __init__(self, blocks: Mapping[int, nn.Module], selectors: Selectors):
        self.selectors = selectors
        self.dropped = {i: dropped for i, block in blocks.items() if (dropped := _Dropped.of(block, selectors[i]))}
        self.batch: Batch | None = None
        self.sinks: Mapping[int, Sink] = {}
        self.handles = [handle for layer, block in blocks.items() for handle in self._hooks(layer, block)]

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def expect(self, batch: Batch, sinks: Mapping[int, Sink]) -> None:
        """The next forward pass is that of `batch`, and those of its layers that have one add to `sinks`."""
        self.batch, self.sinks = batch, sinks

    def _hooks(self, layer: int, block: Any) -> list[Any]:
        seen: dict[str, Tensor] = {}

        def see_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen["x"] = args[0]

        def see_activation(_: nn.Module, __: object, output: Tensor) -> None:
            seen["g"] = output

        def see_output(down: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._measure(layer, down, seen["x"], seen.get("g"), args[0], output)
            seen.clear()

        handles = [block.register_forward_pre_hook(see_input), block.down_proj.register_forward_hook(see_output)]
        if self.selectors[layer].method.name == "cats":
            handles.append(block.act_fn.register_forward_hook(see_activation))
        return handles

    def _measure(self, layer: int, down: Any, x: Tensor, g: Tensor | None, z: Tensor, y: Tensor) -> None:
        assert self.batch is not None
        if layer not in self.sinks:
            return
        if not _finite(x, y):
            for b, sample in enumerate(self.batch.samples):
                real = slice(0, len(sample.ids))
                _check_finite(layer, sample, x[b, real], y[b, real])
        batch = replace(self.batch, device=z.device)  # layers may be on several devices
        rows = batch.rows()
        if layer in self.dropped:
            e = self.dropped[layer].output(z.flatten(0, 1), rows)
        else:
            selector = self.selectors[layer]
            keep = keep_mask(selector, batch, select(selector, batch, g, z), g)
            dropped = torch.where(keep, 0, z.flatten(0, 1)[rows])
            with aligned(down):
                e = F.linear(dropped, down.weight)
        if not _finite(e):  # a finite output may have parts that are not, in float16
            for b, sample in enumerate(self.batch.samples):
                _check_finite(layer, sample, e[batch.owners() == b])
        self.sinks[layer].add(x.flatten(0, 1)[rows], e, y.flatten(0, 1)[rows])


@dataclass(frozen=True)
class _Dropped:
    """The neurons that no generated token keeps: their indices [F - k], and their columns of W_2 [D, F - k]."""

    neurons: Tensor
    weight: Tensor

    @classmethod
    def of(cls, block: Any, selector: LayerSelector) -> _Dropped | None:
        """None where tokens keep different neurons."""
        if fixed_neurons(selector, block) is None:
            return None
        neurons = (~selector.core).nonzero()[:, 0]
        return cls(neurons, block.down_proj.weight.detach()[:, neurons])

    def output(self, z: Tensor, rows: Tensor) -> Tensor:
        """What they add to the output of the tokens `rows` [N]: [N, D] from z [B * T, F]."""
        return F.linear(z[rows[:, None], self.neurons], self.weight)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def _check_finite(layer: int, sample: Sample, *tensors: Tensor) -> None:
    if not _finite(*tensors):
        raise CapreseError(
            f"activations of layer {layer}",
            expected="finite values",
            found=f"NaN or Inf in the sample of line {sample.line}",
            fix="use --dtype bfloat16 or float32, or take the line out",
        )
