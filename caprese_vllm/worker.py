"""What runs in each worker process: vLLM imports this as `worker_extension_cls`, only when Caprese is enabled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.distributed.parallel_state import get_world_group, is_global_first_rank
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger

from caprese_kernels.adapters import Adapters, is_adapter_file
from caprese_kernels.backend import choose
from caprese_kernels.config import BaseModelInfo

from . import compat
from .blocks import replace_blocks
from .enable import method_of
from .ff import STATE, State
from .flags import KEY, dict_of, switched_off
from .lora import load_adapter
from .pages import COMMANDS
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
    settings = dict_of(vllm_config.additional_config).get(KEY)
    if settings is None:
        return model
    config = vllm_config.model_config
    served = BaseModelInfo.from_hf(config.hf_text_config, config.model)
    served.architecture = config.architectures[0]
    device = next(model.parameters()).device
    kernels = choose(settings["kernel"], device)
    slots = vllm_config.scheduler_config.max_num_seqs
    ranks, stages = vllm_config.parallel_config.tensor_parallel_size, get_pp_group()
    state = State(
        method_of(settings),
        RequestTable(device, slots),
        served.num_hidden_layers,
        kernels,
        num_pages=settings["pages"],
        max_tokens=vllm_config.model_config.max_model_len,
        tensor_parallel_size=ranks,
        graph_rows=slots * (1 + vllm_config.num_speculative_tokens),
    )
    here = range(*get_pp_indices(served.num_hidden_layers, stages.rank_in_group, stages.world_size))
    replace_blocks(model, state, here, served, vllm_config.compilation_config.static_forward_context)
    state.allocate()  # now, so that vLLM's memory profile sees the tables
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
    if not is_global_first_rank():
        return  # one line for all: start-up fails unless every rank replaced its blocks
    extra = 2 * sum(b.packed.rank * b.packed.up_plus[0].nbytes for b in state.blocks)
    processes = get_world_group().world_size
    part = f" in the first of {processes} processes" if processes > 1 else ""
    logger.info(
        "Caprese: %d of %d FF blocks replaced: %s, layers %s, kernel %s, L and R %.1f MiB, slot tables of %d requests "
        "%.1f MiB, %d pages of statistics %.1f MiB%s, adapter %s",
        len(state.method.layers), state.num_layers, state.method, _ranges(state.method.layers), state.kernels.NAME,
        extra / 2**20, state.requests.num_slots, state.table.nbytes / 2**20, state.num_pages,
        sum(block.statistics.nbytes for block in state.blocks) / 2**20, part, path or "none (plain baseline)",
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


# V1 runner -------------------------------------------------------------------------------------


def _v1_prepare_inputs(
    original: Callable[..., Any], self: Any, scheduler_output: Any, num_scheduled_tokens: Any
) -> Any:
    result = original(self, scheduler_output, num_scheduled_tokens)
    state = state_of(self.vllm_config)
    if state is not None:
        batch = self.input_batch
        rows = zip(
            batch.req_ids,
            batch.num_prompt_tokens[: batch.num_reqs].tolist(),
            batch.num_computed_tokens_cpu[: batch.num_reqs].tolist(),
            num_scheduled_tokens.tolist(),
            [switched_off(self.requests[req_id].sampling_params) for req_id in batch.req_ids],
            strict=True,
        )
        state.begin(Scheduled(*row) for row in rows)
    return result


def end_step(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """End the step with what runs it, whichever way that ends: what runs between steps is a dummy."""
    state = state_of(self.vllm_config)
    if state is None:
        return original(self, *args, **kwargs)
    scheduler_output = args[0] if args else kwargs.get("scheduler_output")
    state.commands = getattr(scheduler_output, COMMANDS, {})
    try:
        return original(self, *args, **kwargs)
    finally:
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
    compat.wrap(compat.LOAD_LORA, load_adapter)
    compat.wrap(compat.V1_PREPARE_INPUTS, _v1_prepare_inputs)
    compat.wrap(compat.V1_EXECUTE_MODEL, end_step)
    compat.wrap(compat.V1_REQUEST_REMOVED, _v1_request_removed)


install()  # importing is the only call that vLLM makes before it builds the model
