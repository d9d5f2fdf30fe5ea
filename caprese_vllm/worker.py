"""What runs in each worker process: vLLM imports this as `worker_extension_cls`, only when Caprese is enabled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger

from caprese_kernels.adapters import Adapters, is_adapter_file
from caprese_kernels.backend import choose
from caprese_kernels.config import BaseModelInfo

from . import compat
from .blocks import replace_blocks
from .enable import method_of
from .ff import STATE, State
from .flags import KEY
from .requests import RequestTable, Scheduled

logger = init_logger("vllm.caprese")


class WorkerExtension:
    """Methods that vLLM's workers gain, for collective_rpc."""

    def caprese_report(self) -> dict[str, Any]:
        """This worker's part of GET /caprese."""
        state = state_of(self.vllm_config)  # type: ignore[attr-defined]
        assert state is not None
        return state.report()


def state_of(vllm_config: Any) -> State | None:
    """The engine's state; None where Caprese is off (another engine of this process may have it on)."""
    return vllm_config.compilation_config.static_forward_context.get(STATE)


# Model -----------------------------------------------------------------------------------------


def _initialize_model(original: Callable[..., Any], vllm_config: Any, **kwargs: Any) -> Any:
    model = original(vllm_config, **kwargs)
    settings = vllm_config.additional_config.get(KEY)
    if settings is None:
        return model
    config = vllm_config.model_config
    served = BaseModelInfo.from_hf(config.hf_text_config, config.model)
    served.architecture = config.architectures[0]
    device = next(model.parameters()).device
    kernels = choose(settings["kernel"], device)
    state = State(method_of(settings), RequestTable(device), served.num_hidden_layers, kernels)
    replace_blocks(model, state, served, vllm_config.compilation_config.static_forward_context)
    for block in state.blocks:  # now, so that vLLM's memory profile sees the tables; only preemption asks for more
        block.reserve(vllm_config.scheduler_config.max_num_seqs)
    model.caprese = settings["weights"], state
    if vllm_config.use_v2_model_runner:
        from .runner_v2 import model_state_class

        state_class = model_state_class(vllm_config, model, state)
        model.get_model_state_cls = lambda: state_class
    return model


def _process_weights(
    original: Callable[..., Any], model: torch.nn.Module, model_config: Any, target_device: torch.device
) -> None:
    original(model, model_config, target_device)
    ours: Any = getattr(model, "caprese", None)
    if ours is None:
        return
    path, state = ours
    adapters = Adapters.load(path) if path else None
    for block in state.blocks:
        block.fill_adapter(adapters)
    extra = 2 * state.method.rank * sum(b.packed.up_plus[0].nbytes for b in state.blocks)
    logger.info(
        "Caprese: %d of %d FF blocks replaced: %s, layers %s, kernel %s, L and R %.1f MiB, adapter %s",
        len(state.blocks), state.num_layers, state.method, _ranges(state.method.layers), state.kernels.NAME,
        extra / 2**20, path or "none (plain baseline)",
    )  # fmt: skip


def _ranges(layers: tuple[int, ...]) -> str:
    whole = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if whole else ",".join(map(str, layers))


def _prepare_weights(
    original: Callable[..., Any],
    self: Any,
    model_name_or_path: str,
    subfolder: str | None,
    revision: str | None,
    fall_back_to_pt: bool,
    allow_patterns_overrides: list[str] | None,
) -> Any:
    """The model's weight files without the adapters that lie beside them."""
    place = (model_name_or_path, subfolder, revision, fall_back_to_pt)
    folder, files, use_safetensors, index = original(self, *place, allow_patterns_overrides)
    own = [file for file in files if not (file.endswith(".safetensors") and is_adapter_file(file))]
    if files and not own and allow_patterns_overrides is None:
        return original(self, *place, ["*.bin", "*.pt"])  # only the adapter is safetensors
    return folder, own, use_safetensors, index


def switched_off(sampling_params: Any) -> bool:
    """Whether the client sent `vllm_xargs: {"caprese": "off"}`; the front end has refused other values."""
    return KEY in (sampling_params.extra_args or {})


# V1 runner -------------------------------------------------------------------------------------


def _v1_prepare_inputs(
    original: Callable[..., Any], self: Any, scheduler_output: Any, num_scheduled_tokens: Any
) -> Any:
    result = original(self, scheduler_output, num_scheduled_tokens)
    state = state_of(self.vllm_config)
    if state is not None:
        batch = self.input_batch
        off = [switched_off(self.requests[req_id].sampling_params) for req_id in batch.req_ids]
        rows = zip(
            batch.req_ids,
            batch.num_prompt_tokens[: batch.num_reqs].tolist(),
            batch.num_computed_tokens_cpu[: batch.num_reqs].tolist(),
            num_scheduled_tokens.tolist(),
            off,
            strict=True,
        )
        state.begin(state.requests.begin(Scheduled(*row) for row in rows))
    return result


def execute_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """End the step with the forward pass, whichever way it ends: what runs between steps is a dummy."""
    try:
        return original(self, *args, **kwargs)
    finally:
        state = state_of(self.vllm_config)
        if state is not None:
            state.step = None


def _v1_request_removed(original: Callable[..., Any], self: Any, req_id: str, req_state: Any) -> None:
    original(self, req_id, req_state)
    state = state_of(self.vllm_config)
    if state is not None:
        state.finish(req_id)


def install() -> None:
    """Wrap what a worker needs; every wrap passes through for an engine without Caprese."""
    compat.wrap(compat.INITIALIZE_MODEL, _initialize_model)
    compat.wrap(compat.PROCESS_WEIGHTS, _process_weights)
    compat.wrap(compat.PREPARE_WEIGHTS, _prepare_weights)
    compat.wrap(compat.V1_PREPARE_INPUTS, _v1_prepare_inputs)
    compat.wrap(compat.V1_EXECUTE_MODEL, execute_model)
    compat.wrap(compat.V1_REQUEST_REMOVED, _v1_request_removed)


install()  # importing is the only call that vLLM makes before it builds the model
