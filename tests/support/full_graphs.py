"""A V2 engine on a CPU whose CUDA graphs are emulated, and what it sent to which graph.

For a process that imported tests.support.v2_runner before vLLM and has VLLM_USE_BREAKABLE_CUDAGRAPH=1: so graphs can be
piecewise without torch.compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm import LLM
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import CUDAGraphMode
from vllm.forward_context import is_forward_context_available, set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer

from caprese_vllm import blocks, enable
from caprese_vllm.state import State
from tests.support import graph_emulator
from tests.support.engine import engine
from tests.support.graph_emulator import Graph

CAPTURED = [1, 2, 4]  # rows


@dataclass(frozen=True)
class Batch:
    """A real batch, when the runner was about to run it."""

    mode: CUDAGraphMode
    chunks: list[tuple[int, int, int]]  # of each request: prompt's length, first token, number of tokens
    off: bool  # a request has Caprese off
    decode_slots: list[int]  # the buffer that captured kernels read
    slots: list[int]  # the slots of the step's generated tokens


@dataclass
class Watched:
    """An engine and its batches."""

    llm: LLM
    runner: Any
    state: State
    batches: list[Batch] = field(default_factory=list)


@contextmanager
def captured_engine(model_dir: Path, caprese: dict[str, Any], mode: CUDAGraphMode, **options: Any) -> Iterator[Watched]:
    """An engine that has captured its graphs. The CPU platform wants none: `mode` is set where our plugin decides."""
    graph_emulator.install()
    choose = enable._choose_graphs

    def choose_graphs(vllm_config: Any, kernels: Any, extension: Any) -> None:
        compilation = vllm_config.compilation_config
        compilation.cudagraph_mode, compilation.cudagraph_capture_sizes = mode, CAPTURED
        compilation.max_cudagraph_capture_size = max(CAPTURED)
        choose(vllm_config, kernels, extension)

    enable._choose_graphs = choose_graphs
    try:
        with engine(model_dir, caprese, **options) as llm:
            runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
            watched = Watched(llm, runner, runner.model.caprese)
            _watch(watched)
            Graph.opened = {torch.ops.caprese.ff: eager_break_during_capture(blocks._ff)}
            runner.capture_model(profile_only=True)  # else it locks a workspace that the CPU worker does not have
            yield watched
    finally:
        enable._choose_graphs = choose
        Graph.context = nullcontext


def _watch(watched: Watched) -> None:
    """Note each real batch, and give the attention of a replay the metadata of its step."""
    model_state, config = watched.runner.model_state, watched.runner.vllm_config
    prepare_attn = model_state.prepare_attn
    context: dict[str, Any] = {}

    def spy(batch: Any, mode: CUDAGraphMode, tables: Any, mappings: Any, groups: Any, kv: Any, **options: Any) -> Any:
        metadata = prepare_attn(batch, mode, tables, mappings, groups, kv, **options)
        context.update(
            attn_metadata=metadata,
            slot_mapping=build_slot_mappings_by_layer(mappings, kv),
            num_tokens=batch.num_tokens_after_padding,
        )
        step = watched.state.step
        if step is not None and not options.get("for_capture"):
            known = [model_state.watched[req_id] for req_id in batch.req_ids]
            starts, counts = batch.num_computed_tokens_np.tolist(), batch.num_scheduled_tokens.tolist()
            chunks = list(zip((length for length, _ in known), starts, counts, strict=True))
            slots = (watched.state.decode_slots.tolist(), step.sparse_slots.tolist())
            watched.batches.append(Batch(mode, chunks, any(off for _, off in known), *slots))
        return metadata

    model_state.prepare_attn = spy
    Graph.context = lambda: (
        nullcontext() if is_forward_context_available() else set_forward_context(vllm_config=config, **context)
    )
