"""Finding a model's FF blocks, moving their weights into packed storage, and taking over their forward."""

# No `from __future__ import annotations`: vLLM's decorator wraps the op in another module, where its types as strings
# mean nothing.

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear, UnquantizedLinearMethod
from vllm.utils.torch_utils import direct_register_custom_op

from caprese_kernels.config import ACTIVATIONS
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF, allocate

from .ff import STATE, SparseFF, State
from .ranks import Ranks

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp$")


def replace_blocks(model: nn.Module, state: State, here: range, act: str, context: dict[str, Any]) -> None:
    """Replace the forward of every FF block that the method names; refuse if one is missing or foreign.

    `here` are the layers of this pipeline stage; other stages have the rest.
    """
    _register_op()
    context[STATE] = state
    found = {}
    for name, module in model.named_modules():
        match = _LAYER.search(name)
        if match:
            found[int(match[1])] = (name, module)
    for layer in state.method.layers:
        if layer not in here:
            continue
        name, mlp = found.get(layer, ("", None))
        _check_block(layer, mlp)
        assert mlp is not None
        key = f"{name}.caprese"
        ranks = Ranks(mlp.down_proj.tp_rank, mlp.down_proj.tp_size)
        packed = _repack(mlp, -(-state.method.rank // ranks.size), ACTIVATIONS[act], ranks)
        context[key] = block = SparseFF(name, mlp, packed, ranks, layer, state.method, state)
        state.blocks.append(block)
        mlp.forward = _forward(key, _take_over_reduction(mlp.down_proj))


def _repack(mlp: Any, rank: int, act: str, ranks: Ranks) -> PackedFF:
    """Move an MLP's weights into neuron-major storage with room for L^T and R, before they are loaded.

    vLLM's parameters become views of that storage, of the same names and shapes: weights live once,
    and loaders as well as the prompt path notice nothing.
    """
    gate_up, down = mlp.gate_up_proj, mlp.down_proj
    assert isinstance(gate_up, MergedColumnParallelLinear)
    assert isinstance(down, RowParallelLinear)
    neurons = down.weight.shape[1]
    rows = allocate(2 * neurons + rank, gate_up.weight)  # gate, up, L^T
    down_plus = allocate(neurons + rank, gate_up.weight)
    gate_up.weight.data = rows[: 2 * neurons]
    down.weight.data = down_plus[:neurons].t()
    for layer in (gate_up, down):
        layer._cpu_skip_gemm_dispatch = True  # vLLM's CPU backend would pack a copy and drop ours
    bias = None if gate_up.bias is None else gate_up.bias.data
    # One rank adds the bias, as in vLLM's layer.
    down_bias = None if down.bias is None or ranks.rank else down.bias.data
    return PackedFF(rows, down_plus, act, rank, bias, down_bias)


def _take_over_reduction(down: Any) -> bool:
    """Whether vLLM's layer summed y over ranks. Now it must not: the block does so once, for all its rows."""
    reduces = bool(down.reduce_results) and down.tp_size > 1
    down.reduce_results = False
    return reduces


def _forward(key: str, reduce: bool) -> Any:
    def forward(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops.caprese.ff(x, out, key)
        # Outside of the op: the compiler fuses this sum with what follows, and graphs hold it, as in plain vLLM.
        return tensor_model_parallel_all_reduce(out) if reduce else out

    return forward


def _check_block(layer: int, mlp: nn.Module | None) -> None:
    gate_up, down = getattr(mlp, "gate_up_proj", None), getattr(mlp, "down_proj", None)
    if not (
        isinstance(gate_up, MergedColumnParallelLinear)
        and isinstance(down, RowParallelLinear)
        and len(gate_up.output_sizes) == 2
        and hasattr(mlp, "act_fn")
    ):
        found = "none" if mlp is None else type(mlp).__name__
    elif not (type(gate_up.quant_method) is type(down.quant_method) is UnquantizedLinearMethod):
        found = f"weights handled by {type(gate_up.quant_method).__name__}"
    else:
        return
    raise CapreseError(
        f"FF block of layer {layer}",
        expected="layers.N.mlp with unquantized gate_up_proj, act_fn and down_proj",
        found=found,
        fix="serve a supported architecture without quantization",
    )


def _ff(x: Tensor, out: Tensor, key: str) -> None:
    get_forward_context().no_compile_layers[key].run(x, out)


def _ff_fake(x: Tensor, out: Tensor, key: str) -> None:
    return None


_library: Library | None = None


def _register_op() -> None:
    """Define torch.ops.caprese.ff(x, out!, key), opaque to the compiler as attention is."""
    global _library
    if _library is None:
        _library = Library("caprese", "FRAGMENT")
        direct_register_custom_op(
            "ff",
            eager_break_during_capture(_ff),
            mutates_args=["out"],
            fake_impl=_ff_fake,
            target_lib=_library,
        )
