"""The V2 model runner (the default on GPUs): a ModelState that plans each real batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

from . import compat
from .ff import State
from .flags import switched_off
from .requests import Scheduled
from .worker import execute_model, state_of


def model_state_class(vllm_config: Any, model: Any, state: State) -> type:
    """The model's own ModelState class, with Caprese's bookkeeping."""
    compat.wrap(compat.V2_EXECUTE_MODEL, execute_model)
    compat.wrap(compat.V2_FINISH_REQUESTS, _finish_requests)
    base: Any = resolve_model_state_cls(vllm_config, model)

    class CapreseModelState(base):
        """Adds no tensors to the model's inputs; only watches which rows are whose."""

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

    return CapreseModelState


def _finish_requests(original: Callable[..., Any], self: Any, scheduler_output: Any) -> None:
    original(self, scheduler_output)
    state = state_of(self.vllm_config)
    if state is not None:
        for req_id in scheduler_output.finished_req_ids:
            state.finish(req_id)
