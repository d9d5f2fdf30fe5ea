"""The dense FF block as plain vLLM runs it, with which the sparse kernels are compared.

Every implementation that vLLM may use is a candidate; the fastest in the same run is called "dense".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caprese_kernels.packed import ACTIVATION_FUNCTIONS

Forward = Callable[[Tensor], Tensor]
Linear = Callable[[Tensor], Tensor]


@dataclass
class DenseWeights:
    """The weights as vLLM stores them: gate_up [2F, D] and down [D, F]."""

    gate_up: Tensor
    down: Tensor


def candidates(device: str, activation: str, compiled: bool) -> dict[str, Callable[[DenseWeights], Forward]]:
    """Implementations of the block by name: each takes the weights and returns a function x [T, D] -> y [T, D].

    CPU: "onednn" is vLLM's own dispatch for unquantized linear layers, if vLLM is installed; "linear" is torch's.
    CUDA: "cublas" is torch's linear layer. Gate and up are one product, as in vLLM's layers.
    "+compile" compiles the activation into one kernel, as vLLM does; "compiled" compiles the whole block. Compiling
    takes long: unless `compiled`, only CUDA's activation is compiled.
    """
    plain, whole = _gated(activation), _whole(activation)
    fused = torch.compile(plain)

    def of_linears(make: Callable[[Tensor], Linear], act: Forward) -> Callable[[DenseWeights], Forward]:
        def prepare(weights: DenseWeights) -> Forward:
            gate_up, down = make(weights.gate_up), make(weights.down)
            return lambda x: down(act(gate_up(x)))

        return prepare

    def with_compiler(weights: DenseWeights) -> Forward:
        run = torch.compile(whole)
        return lambda x: run(x, weights.gate_up, weights.down)

    found: dict[str, Callable[[DenseWeights], Forward]] = {}
    if device == "cuda":
        found["cublas"] = of_linears(_torch_linear, plain)
        found["cublas+compile"] = of_linears(_torch_linear, fused)
    else:
        found["linear"] = of_linears(_torch_linear, plain)
        if _has_vllm():
            found["onednn"] = of_linears(_vllm_linear, plain)
            if compiled:
                found["onednn+compile"] = of_linears(_vllm_linear, fused)
    if compiled:
        found["compiled"] = with_compiler
    return found


def _gated(activation: str) -> Forward:
    act = ACTIVATION_FUNCTIONS[activation]

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up

    return gated


def _whole(activation: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    gated = _gated(activation)

    def block(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return F.linear(gated(F.linear(x, gate_up)), down)

    return block


def _torch_linear(weight: Tensor) -> Linear:
    return lambda x: F.linear(x, weight)


def _has_vllm() -> bool:
    try:
        from vllm.model_executor.layers import utils
        from vllm.platforms import current_platform
    except ImportError:
        return False
    return bool(current_platform.is_cpu()) and hasattr(utils, "dispatch_cpu_unquantized_gemm")


def _vllm_linear(weight: Tensor) -> Linear:
    """A linear layer by vLLM's CPU dispatch, which packs the weight for oneDNN if it can."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x: layer.cpu_linear(x, layer.weight, None)
