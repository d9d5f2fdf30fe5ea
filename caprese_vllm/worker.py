"""What runs in each worker process: vLLM imports this as `worker_extension_cls`, only when Caprese is enabled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.distributed.parallel_state import get_world_group, is_global_first_rank
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger

from caprese_kernels.adapters import is_adapter_file
from caprese_kernels.backend import choose
from caprese_kernels.config import BaseModelInfo, layer_spans
from caprese_kernels.errors import printable
from caprese_kernels.self_check import refuse

from . import compat, ff_kernels
from .blocks import pack_blocks, take_over
from .ff import SparseFF
from .lora import load_adapter
from .memory import MemoryNeeds
from .requests import RequestTable, Scheduled
from .settings import EngineSettings, switched_off
from .state import STATE, State, reload_weights, run_step, state_of
from .statistics import Statistics

logger = init_logger("vllm.caprese")


class WorkerExtension:
    """Methods that vLLM adds to its workers, for collective_rpc."""

    def caprese_report(self) -> dict[str, Any]:
        """This worker's part of GET /caprese."""
        state = state_of(self.vllm_config)  # type: ignore[attr-defined]
        assert state is not None
        return state.report()

    def caprese_selections(self, name: str) -> dict[str, Any] | None:
        """This worker's part of GET /caprese/selections/NAME."""
        state = state_of(self.vllm_config)  # type: ignore[attr-defined]
        assert state is not None
        return state.selections(name)

    def caprese_check(self) -> dict[int, dict[str, Any]]:
        """This worker's part of `caprese doctor`: every block's kernels, by layer."""
        state = state_of(self.vllm_config)  # type: ignore[attr-defined]
        assert state is not None
        found = state.check_kernels(all_blocks=True)
        return {layer: {**asdict(check), "passed": check.passed} for layer, check in found.items()}


# Model -----------------------------------------------------------------------------------------


def _initialize_model(original: Callable[..., Any], vllm_config: Any, **kwargs: Any) -> Any:
    """Build vLLM's model and replace the FF blocks of the sparse layers, before their weights are loaded."""
    model = original(vllm_config, **kwargs)
    settings = EngineSettings.read(vllm_config)
    if settings is None:
        return model
    config, stage = vllm_config.model_config, get_pp_group()
    served = BaseModelInfo.from_hf(config.hf_text_config, config.model, config.architectures)
    stage_layers = range(*get_pp_indices(served.num_hidden_layers, stage.rank_in_group, stage.world_size))
    needs = MemoryNeeds.of(vllm_config, settings, served, sum(i in stage_layers for i in settings.method.layers))
    with needs.reported():
        _replace_blocks(model, vllm_config, settings, served, stage_layers, needs)
    return model


def _replace_blocks(
    model: Any,
    vllm_config: Any,
    settings: EngineSettings,
    served: BaseModelInfo,
    stage_layers: range,
    needs: MemoryNeeds,
) -> None:
    method, config, parallel = settings.method, vllm_config.model_config, vllm_config.parallel_config
    device = next(model.parameters()).device
    packed = pack_blocks(model, method, stage_layers, served)
    weights = {block.layer: ff for block, ff, _ in packed}
    built_in = choose(settings.kernel, device)
    kernels = ff_kernels.make(settings.kernel_extension, built_in, method, weights)
    slots = vllm_config.scheduler_config.max_num_seqs
    state = State(
        method,
        RequestTable(device, slots, method.needs_statistic),
        served.num_hidden_layers,
        kernels,
        built_in=built_in,
        weights=settings.weights,
        digest=settings.digest,
        start_up_check=settings.start_up_check,
        tensor_parallel_size=parallel.tensor_parallel_size,
        show_selections=settings.show_selections,
        graph_rows=slots * (1 + vllm_config.num_speculative_tokens),
        reselect_interval=settings.reselect_interval,
        needs=needs,
    )
    context = vllm_config.compilation_config.static_forward_context
    context[STATE] = state
    for block, ff, ranks in packed:
        own = method.at(block.layer)
        statistics = Statistics(own, ff, kernels, ranks, settings.num_pages, config.max_model_len)
        state.blocks.append(SparseFF(block, ff, ranks, own, statistics))
        take_over(state.blocks[-1], context)
    state.allocate()  # now, so that vLLM's memory profile sees the tables
    model.caprese = state
    if vllm_config.use_v2_model_runner:
        from .runner_v2 import model_state_class  # it imports the V2 runner, which platforms with V1 do without

        state_class = model_state_class(vllm_config, model, state)
        model.get_model_state_cls = lambda: state_class


def _process_weights(
    original: Callable[..., Any], model: torch.nn.Module, model_config: Any, target_device: torch.device
) -> None:
    original(model, model_config, target_device)
    state: State | None = getattr(model, "caprese", None)
    if state is None:
        return
    assert state.needs is not None
    with state.needs.reported():
        state.fill_adapters()
        state.warm_up()
        if state.start_up_check:
            assert state.built_in is not None
            for layer, found in state.check_kernels().items():
                refuse(found, state.built_in.NAME, layer)
    if not is_global_first_rank():
        return  # one line for all: start-up fails unless every rank replaced its blocks
    extra = 2 * sum(b.packed.rank * b.packed.up_plus[0].nbytes for b in state.blocks)
    processes = get_world_group().world_size
    part = f" in the first of {processes} processes" if processes > 1 else ""
    num_pages = max((block.statistics.num_pages for block in state.blocks), default=0)
    logger.info(
        "Caprese: %d of %d FF blocks replaced: %s, layers %s, kernel %s, L and R %.1f MiB, slot tables of %d requests "
        "%.1f MiB, %d pages of statistics %.1f MiB%s, %s, adapter %s",
        len(state.method.layers), state.num_layers, state.method, layer_spans(state.method.layers), state.kernels.NAME,
        extra / 2**20, state.requests.num_slots, (state.table.nbytes + state.statistics.nbytes) / 2**20,
        num_pages,
        sum(block.statistics.nbytes for block in state.blocks) / 2**20, part,
        _describe_reselection(state.reselect_interval),
        printable(state.weights or "none (plain baseline)"),
    )  # fmt: skip


def _describe_reselection(interval: int | None) -> str:
    if interval is None:
        return "no reselection"
    return f"reselection every {interval} tokens" if interval else "reselection where a request asks"


def _prepare_weights(
    original: Callable[..., Any],
    self: Any,
    model_name_or_path: str,
    subfolder: str | None,
    revision: str | None,
    fall_back_to_pt: bool,
    allow_patterns_overrides: list[str] | None,
) -> Any:
    """The model's weight files, without the adapters in the same folder."""
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


def _v1_request_removed(original: Callable[..., Any], self: Any, req_id: str, req_state: Any) -> None:
    original(self, req_id, req_state)
    state = state_of(self.vllm_config)
    if state is not None:
        state.finish_request(req_id)


def install() -> None:
    """Wrap what a worker needs; every wrap passes through for an engine without Caprese."""
    compat.wrap(compat.INITIALIZE_MODEL, _initialize_model)
    compat.wrap(compat.PROCESS_WEIGHTS, _process_weights)
    compat.wrap(compat.V1_RELOAD_WEIGHTS, reload_weights)
    compat.wrap(compat.PREPARE_WEIGHTS, _prepare_weights)
    compat.wrap(compat.LOAD_LORA, load_adapter)
    compat.wrap(compat.V1_PREPARE_INPUTS, _v1_prepare_inputs)
    compat.wrap(compat.V1_EXECUTE_MODEL, run_step)
    compat.wrap(compat.V1_REQUEST_REMOVED, _v1_request_removed)


install()  # importing is the only call that vLLM makes before it builds the model
