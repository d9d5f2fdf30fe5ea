"""CUDA graphs on a CPU: a recorder of operations in the place of torch.cuda.CUDAGraph.

A CUDA graph keeps the kernels that a forward pass launched, with their arguments: tensors by address, anything else by
value. No Python of the model runs when it is replayed. `Graph` keeps the same: each operator that reaches PyTorch's
dispatcher and each launch of a Triton kernel (in the interpreter), and replays them on the same memory. What a stream
in capture refuses is refused: reading a value back, and shapes that depend on data.

Operators implemented in Python are one opaque launch each, but for those that a caller opens (`opened`), of which what
they launch is recorded. So attention stays Python here, with the metadata of the step that is replayed: the CPU's
attention, unlike the GPU's, makes new metadata in every step. The FF op is opened: of it nothing else runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

aten = torch.ops.aten
# Each waits for the device to know a value or a shape: cudaErrorStreamCaptureUnsupported.
SYNCHRONIZING = {
    aten._local_scalar_dense, aten.item, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
ALLOCATING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class CaptureError(RuntimeError):
    """Something that a stream in capture does not permit."""


class Graph:
    """In place of torch.cuda.CUDAGraph. Captures while a Recorder is entered."""

    opened: ClassVar[dict[Any, Callable[..., Any]]] = {}  # operator -> the Python function behind it
    context: ClassVar[Callable[[], AbstractContextManager[Any]]] = nullcontext  # of each replay
    active: ClassVar[Graph | None] = None
    replays: ClassVar[int] = 0

    def __init__(self) -> None:
        self.launches: list[tuple[str, Callable[[], None]]] = []  # by name

    def capture_begin(self, pool: object = None) -> None:
        assert Graph.active is None, "captures do not nest"
        Graph.active = self

    def capture_end(self) -> None:
        assert Graph.active is self
        Graph.active = None

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.capture_begin()
        try:
            yield
        finally:
            Graph.active = None

    def replay(self) -> None:
        Graph.replays += 1
        with Graph.context():
            for _, launch in self.launches:
                launch()


class Recorder(TorchDispatchMode):
    """Lets the graph in capture, if there is one, keep what runs."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        body = Graph.opened.get(func.overloadpacket)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        graph = Graph.active
        if graph is not None:
            self._check(func, args)
        out = func(*args, **kwargs)
        if graph is not None and graph is Graph.active:  # else it was an eager break between two graphs
            self._record(graph, func, args, kwargs, out)
        return out

    def _check(self, func: Any, args: Sequence[Any]) -> None:
        masks = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func.overloadpacket in SYNCHRONIZING or masks:
            raise CaptureError(f"operation not permitted when stream is capturing: {func}")
        if func.overloadpacket == aten.lift_fresh:
            raise CaptureError("a tensor is made from Python values: on replay it would be what it was at capture")

    def _record(self, graph: Graph, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        made = [t.untyped_storage().data_ptr() not in given for t in outs]
        if func.namespace == "aten":
            if func.overloadpacket in ALLOCATING:
                return  # the memory is there, and stays: `outs` live as long as whatever reads them
            if not any(made) and not func._schema.is_mutable:
                return  # a view

        def launch() -> None:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new, fresh in zip(outs, again, made, strict=True):
                if fresh:
                    old.copy_(new)

        graph.launches.append((str(func), launch))


def _launch_triton(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    graph = Graph.active
    if graph is None:
        original(self, *args, **kwargs)
        return
    with _disable_current_modes():
        original(self, *args, **kwargs)
    graph.launches.append((self.fn.__name__, lambda: original(self, *args, **kwargs)))


def install() -> None:
    """Put Graph where vLLM's V2 runner looks for CUDA graphs, for the rest of the process."""
    from vllm.compilation import breakable_cudagraph
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
    from vllm.v1.worker.gpu import cudagraph_utils

    torch.cuda.CUDAGraph = Graph
    torch.cuda.graph = lambda graph, pool=None, stream=None: graph.capture()
    torch.accelerator.empty_cache = lambda: None
    torch.accelerator.get_memory_info = lambda: (0, 0)
    cudagraph_utils.graph_capture = lambda device: Recorder()
    for module in (cudagraph_utils, breakable_cudagraph):
        module.capture_pool = lambda pool, config: nullcontext()
    breakable_cudagraph.weak_ref_tensor = breakable_cudagraph.weak_ref_tensors = lambda tensors: tensors
    CpuPlatform.graph_pool_handle = lambda self: None
    CPUAttentionMetadataBuilder._cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    hook_triton()


def hook_triton() -> None:
    original = GridExecutor.__call__
    GridExecutor.__call__ = lambda self, *args, **kwargs: _launch_triton(original, self, *args, **kwargs)
