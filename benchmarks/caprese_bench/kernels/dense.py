"""The dense FF block as plain vLLM runs it: what the sparse kernels are compared with.

Every way that vLLM may take is a candidate; the fastest in the same run is "dense".
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
    """As vLLM holds them: gate_up [2F, D] and down [D, F]."""

    gate_up: Tensor
    down: Tensor


def candidates(device: str, activation: str, compiled: bool) -> dict[str, Callable[[DenseWeights], Forward]]:
    """Ways to run a block, by name, each a function from weights to x [T, D] -> y [T, D].

    CPU: "onednn" is vLLM's own dispatch for unquantized linears (only where vLLM is installed), "linear" torch's.
    CUDA: "cublas" is torch's linear; it and vLLM's layers have gate and up in one product.
    "+compile" has the activation compiled into one kernel, as vLLM does, "compiled" the whole block. Compiling takes
    long: without `compiled` only CUDA's activation is.
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
    """A linear layer after vLLM's CPU dispatch, which packs the weight for oneDNN where it can."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x: layer.cpu_linear(x, layer.weight, None)
