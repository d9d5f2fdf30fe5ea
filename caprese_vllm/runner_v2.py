"""The V2 model runner (the default on GPUs): a ModelState that begins and ends Caprese's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

from . import compat
from .requests import Scheduled
from .settings import switched_off
from .state import State, reload_weights, run_step, state_of


def model_state_class(vllm_config: Any, model: Any, state: State) -> type:
    """The model's own ModelState class, with Caprese's bookkeeping."""
    compat.wrap(compat.V2_EXECUTE_MODEL, run_step)
    compat.wrap(compat.V2_CAPTURE_MODEL, run_step)
    compat.wrap(compat.V2_RELOAD_WEIGHTS, reload_weights)
    compat.wrap(compat.V2_FINISH_REQUESTS, _finish_requests)
    compat.wrap(compat.V2_GATHER_BATCH, _gather_batch)
    compat.wrap(compat.V2_UPDATE_REQUESTS, _update_requests)
    base: Any = resolve_model_state_cls(vllm_config, model)

    class CapreseModelState(base):
        """Adds no tensors to the model's inputs; only follows which rows belong to which request."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.watched: dict[str, tuple[int, bool]] = {}  # prompt length, switched off

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            off = switched_off(new_req_data.sampling_params)
            self.watched[new_req_data.req_id] = (new_req_data.prompt_len, off)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self.watched.pop(req_id, None)

        def preprocess_state(self, input_batch: Any, *args: Any) -> None:
            super().preprocess_state(input_batch, *args)  # vLLM calls it for real batches only
            prompt_lens, off = zip(*(self.watched[req_id] for req_id in input_batch.req_ids), strict=True)
            rows = zip(
                input_batch.req_ids,
                prompt_lens,
                input_batch.num_computed_tokens_np.tolist(),
                input_batch.num_scheduled_tokens.tolist(),
                off,
                strict=True,
            )
            state.begin(Scheduled(*row) for row in rows)

        def prepare_attn(
            self, input_batch: Any, cudagraph_mode: Any, *args: Any, for_capture: bool = False, **kwargs: Any
        ) -> Any:
            """vLLM calls it before each forward pass, before it captures one, and before it replays one.

            `for_capture` is set for dummy batches of full graphs: captured, run beforehand to warm up, or replayed.
            """
            if for_capture:
                state.begin_dummy_decode(input_batch.num_tokens_after_padding)
            elif cudagraph_mode == CUDAGraphMode.FULL and not (state.step and state.can_replay(state.step)):
                raise RuntimeError("a batch with more than sparse generated tokens was sent to a full CUDA graph")
            return super().prepare_attn(input_batch, cudagraph_mode, *args, for_capture=for_capture, **kwargs)

        def only_decodes(self, batch: Any, num_computed_tokens: Any) -> bool:
            """Whether every row is a generated token of a request that runs sparse."""
            starts = num_computed_tokens[batch.idx_mapping_np].tolist()
            for req_id, start in zip(batch.req_ids, starts, strict=True):
                prompt_len, off = self.watched[req_id]
                if off or start < state.requests.dense_length(req_id, prompt_len):
                    return False
            return True

    return CapreseModelState


def _gather_batch(original: Callable[..., Any], self: Any, scheduler_output: Any, dummy_run: bool) -> Any:
    """Keep a prompt's last token, scheduled alone, out of full graphs of decoding, to which vLLM would send it."""
    batch, uniform_token_count = original(self, scheduler_output, dummy_run)
    if batch is None or state_of(self.vllm_config) is None:
        return batch, uniform_token_count
    if self.model_state.only_decodes(batch, self.req_states.num_computed_tokens_np):
        return batch, uniform_token_count
    # has_prefill also keeps it out of graphs for decode batches of mixed lengths.
    return batch._replace(has_prefill=True, decode_graph_eligible=False), None


def _update_requests(original: Callable[..., Any], self: Any, scheduler_output: Any) -> None:
    """Take requests back to where their rounds begin; up to the rounds' ends nothing is sampled, as in a prompt.

    vLLM counts computed tokens on the device, and takes a running request's on the host for that count's mirror.
    """
    state = state_of(self.vllm_config)
    commands = {} if state is None else state.commands
    requests, rows = scheduler_output.scheduled_cached_reqs, self.req_states
    begun = False
    for req_id, computed in zip(requests.req_ids, requests.num_computed_tokens, strict=True):
        command = commands.get(req_id)
        if command is not None and command.length is not None:
            row = rows.req_id_to_index[req_id]
            rows.prefill_len.np[row] = command.length
            rows.num_computed_tokens.stage_write_elem(row, computed)
            begun = True
    if begun:
        rows.prefill_len.copy_to_uva()
        rows.num_computed_tokens.apply_write()
    original(self, scheduler_output)


def _finish_requests(original: Callable[..., Any], self: Any, scheduler_output: Any) -> None:
    original(self, scheduler_output)
    state = state_of(self.vllm_config)
    if state is not None:
        for req_id in scheduler_output.finished_req_ids:
            state.finish_request(req_id)
