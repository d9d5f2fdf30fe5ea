"""Move the weights of a model's FF blocks into packed storage, and replace their forward."""

# No `from __future__ import annotations`: vLLM's decorator wraps the op in another module, where annotations that are
# strings cannot be resolved.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.packed import PackedFF, allocate

from .architectures import Block, find_block
from .ff import SparseFF
from .ranks import Ranks
from .state import STATE

# torch keeps freed memory, and packed weights with their r rows more do not fit into the places of those that they
# replace: all FF weights would be held twice (19 GiB at 14B). Freed every few blocks, at most these are.
RELEASE_EVERY = 4


def pack_blocks(
    model: nn.Module, method: Method, stage_layers: range, served: BaseModelInfo
) -> list[tuple[Block, PackedFF, Ranks]]:
    """Move the weights of every FF block that the method names into packed storage; in order of layers.

    `stage_layers` are the layers of this pipeline stage; other stages have the rest. Raises CapreseError if a block is
    missing or does more than an FF block does.
    """
    packed = []
    for layer in method.layers:
        if layer in stage_layers:
            block = find_block(model, layer, served)
            ranks = Ranks(block.down.tp_rank, block.down.tp_size)
            packed.append((block, _repack(block, -(-method.rank // ranks.size), ranks), ranks))
            if len(packed) % RELEASE_EVERY == 0 and block.up.weight.is_cuda:
                torch.cuda.empty_cache()
    return packed


def take_over(ff: SparseFF, context: dict[str, Any]) -> None:
    """Have the model compute the sparse block in place of its own. `context` is vLLM's of this engine."""
    _register_op()
    key = f"{ff.block.name}.caprese"
    context[key] = ff
    ff.block.take_over(_forward(key, _take_over_reduction(ff.block.down)))


def _repack(block: Block, rank: int, ranks: Ranks) -> PackedFF:
    """Move a block's weights into neuron-major storage with room for L^T and R, before they are loaded.

    vLLM's parameters become views of that storage, with the same names and shapes: the weights exist once, and neither
    the loaders nor the prompt path need to know. `rank` is this rank's part of r.
    """
    up, down = block.up, block.down
    rows, neurons = up.weight.shape[0], down.weight.shape[1]
    up_plus = allocate(rows + rank, up.weight)  # gate (if there is one), up, L^T
    down_plus = allocate(neurons + rank, up.weight)
    up.weight.data = up_plus[:rows]
    down.weight.data = down_plus[:neurons].t()
    for layer in (up, down):
        layer._cpu_skip_gemm_dispatch = True  # vLLM's CPU backend would pack a copy and drop ours
    bias = None if up.bias is None else up.bias.data
    # One rank adds the bias, as in vLLM's layer.
    down_bias = None if down.bias is None or ranks.rank else down.bias.data
    return PackedFF(up_plus, down_plus, block.activation, rank, bias, down_bias)


def _take_over_reduction(down: Any) -> bool:
    """Whether vLLM's layer summed y over ranks. From now on the block does, once for all its rows."""
    reduces = bool(down.reduce_results) and down.tp_size > 1
    down.reduce_results = False
    return reduces


def _forward(key: str, reduce: bool) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # [1, T, D] in transformers' models
        out = torch.empty_like(rows)
        torch.ops.caprese.ff(rows, out, key)
        out = out.view_as(x)
        # Outside of the op: the compiler fuses this sum with what follows, and graphs hold it, as in plain vLLM.
        return tensor_model_parallel_all_reduce(out) if reduce else out

    return forward


def _ff(x: Tensor, out: Tensor, key: str) -> None:
    context = get_forward_context().no_compile_layers
    context[key].run(x, out, context[STATE].view)


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
