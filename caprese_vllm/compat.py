"""Every vLLM symbol that the plugin touches. vLLM 0.32 and 0.33.

SEAMS are wrapped: each with why, and when the wrap can go. `wrap` is the only place where vLLM is changed; it is
idempotent and checks what it finds. USES are only imported, called, overridden or read. tests/plugin/test_compat.py
checks both lists against the installed vLLM, and that no import escapes them; test_contract.py against the source of
another release.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from caprese_kernels.errors import CapreseError

PROVEN_VLLM = "0.32"  # all tests run on it
READ_VLLM = ("0.33",)  # its source was compared with the proven one's, symbol by symbol (docs/compatibility.md)


@dataclass(frozen=True)
class Symbol:
    """`needs`: the parameters of a function, or the attributes of a class and its instances, that we rely on."""

    module: str
    name: str
    needs: tuple[str, ...]

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> Any:
        """The module or class that holds the symbol."""
        owner = importlib.import_module(self.module)
        for part in self.name.split(".")[:-1]:
            owner = getattr(owner, part)
        return owner

    @property
    def attribute(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Seam(Symbol):
    """A wrapped symbol."""

    why: str
    until: str


ADD_CLI_ARGS = Seam(
    "vllm.engine.arg_utils",
    "EngineArgs.add_cli_args",
    ("parser",),
    "adds --caprese-weights and --caprese-config to `vllm serve`",
    "vLLM lets a plugin add flags",
)
CREATE_ENGINE_CONFIG = Seam(
    "vllm.engine.arg_utils",
    "EngineArgs.create_engine_config",
    ("self",),
    "validates the adapter and refuses what does not fit before any process starts",
    "vLLM validates additional_config by a plugin's hook",
)
INITIALIZE_MODEL = Seam(
    "vllm.model_executor.model_loader.base_loader",
    "initialize_model",
    ("vllm_config",),
    "replaces the FF blocks when the model is built, before its weights are loaded",
    "vLLM offers a hook between building and loading a model",
)
PROCESS_WEIGHTS = Seam(
    "vllm.model_executor.model_loader.base_loader",
    "process_weights_after_loading",
    ("model", "model_config", "target_device"),
    "copies L, R and proves the replacement once the weights are in place",
    "vLLM offers a hook after loading a model",
)
V1_RELOAD_WEIGHTS = Seam(
    "vllm.v1.worker.gpu_model_runner",
    "reload_weights",
    ("vllm_config", "model"),
    "puts a core's neurons back where checkpoints have them while weights are loaded again (V1 runner)",
    "vLLM offers hooks around loading weights again",
)
V2_RELOAD_WEIGHTS = Seam(
    "vllm.v1.worker.gpu.model_runner",
    "reload_weights",
    ("vllm_config", "model"),
    "puts a core's neurons back where checkpoints have them while weights are loaded again (V2 runner)",
    "vLLM offers hooks around loading weights again",
)
PREPARE_WEIGHTS = Seam(
    "vllm.model_executor.model_loader.default_loader",
    "DefaultModelLoader._prepare_weights",
    ("self", "model_name_or_path", "allow_patterns_overrides"),
    "keeps adapter files that lie in the model's own directory from being loaded as its weights",
    "vLLM ignores safetensors files whose header names another format",
)
LOAD_LORA = Seam(
    "vllm.lora.worker_manager",
    "WorkerLoRAManager._load_adapter",
    ("self", "lora_request"),
    "refuses LoRA adapters that change a replaced FF block",
    "sparse rows apply LoRA adapters",
)
ADD_ENDPOINTS = Seam(
    "vllm.plugins",
    "load_endpoint_plugins",
    ("supported_tasks",),
    "adds GET /caprese when Caprese is enabled; an entry point would make vLLM warn whenever it is merely installed",
    "vLLM has a quiet way to add a route",
)
VALIDATE_PARAMS = Seam(
    "vllm.v1.engine.input_processor",
    "InputProcessor._validate_params",
    ("self", "params"),
    "answers a wrong per-request switch with HTTP 400",
    "vLLM lets a plugin validate its extra_args",
)
V1_PREPARE_INPUTS = Seam(
    "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunner._prepare_inputs",
    ("self", "scheduler_output", "num_scheduled_tokens"),
    "tells which row of the batch belongs to which request (V1 runner)",
    "the V1 runner is removed",
)
V1_EXECUTE_MODEL = Seam(
    "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunner.execute_model",
    ("self", "scheduler_output"),
    "ends the step, so that profiling and dummy batches run dense (V1 runner)",
    "the V1 runner is removed",
)
V1_REQUEST_REMOVED = Seam(
    "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunner._on_request_state_removed",
    ("self", "req_id"),
    "frees a finished request's slot (V1 runner)",
    "the V1 runner is removed",
)
V2_FINISH_REQUESTS = Seam(
    "vllm.v1.worker.gpu.model_runner",
    "GPUModelRunner.finish_requests",
    ("self", "scheduler_output"),
    "frees a finished request's slot; ModelState.remove_request does not tell finished from preempted (V2 runner)",
    "ModelState.remove_request tells why",
)
V2_EXECUTE_MODEL = Seam(
    "vllm.v1.worker.gpu.model_runner",
    "GPUModelRunner.execute_model",
    ("self", "scheduler_output"),
    "ends the step, so that profiling and dummy batches run dense (V2 runner)",
    "ModelState has a hook after the forward pass",
)
V2_CAPTURE_MODEL = Seam(
    "vllm.v1.worker.gpu.model_runner",
    "GPUModelRunner.capture_model",
    ("self",),
    "ends the dummy step that full CUDA graphs capture (V2 runner)",
    "ModelState has a hook after the forward pass",
)
V2_GATHER_BATCH = Seam(
    "vllm.v1.worker.gpu.model_runner",
    "GPUModelRunner.gather_batch_req_state",
    ("self", "scheduler_output", "dummy_run"),
    "keeps prompt tokens and requests with Caprese off out of full CUDA graphs of decoding (V2 runner)",
    "ModelState has a say in what is a decode batch; vLLM counts a prompt's last token, scheduled alone, as one",
)
V2_UPDATE_REQUESTS = Seam(
    "vllm.v1.worker.gpu.model_runner",
    "GPUModelRunner.update_requests",
    ("self", "scheduler_output"),
    "takes requests back to where a round of reselection begins (V2 runner)",
    "vLLM lets a scheduler compute tokens of a running request again",
)
SEAMS = tuple(value for value in globals().values() if isinstance(value, Seam))

# module, symbol, what of it: one line each.
_USES = """
vllm.engine.arg_utils EngineArgs: additional_config model hf_overrides quantization quantization_config enable_sleep_mode worker_extension_cls scheduler_cls
vllm.config VllmConfig: additional_config model_config parallel_config compilation_config scheduler_config cache_config offload_config load_config speculative_config kv_transfer_config weight_transfer_config use_v2_model_runner num_speculative_tokens
vllm.config ModelConfig: model architectures dtype hf_config hf_text_config max_model_len model_impl runner_type quantization quantization_config enable_prompt_embeds get_num_experts get_sliding_window
vllm.config ParallelConfig: worker_extension_cls tensor_parallel_size pipeline_parallel_size data_parallel_size decode_context_parallel_size prefill_context_parallel_size use_ubatching
vllm.config CompilationConfig: splitting_ops cudagraph_mode static_forward_context
vllm.config CUDAGraphMode: NONE PIECEWISE has_full_cudagraphs
vllm.config CacheConfig: kv_sharing_fast_prefill enable_prefix_caching
vllm.config SchedulerConfig: max_num_seqs async_scheduling scheduler_cls disable_hybrid_kv_cache_manager
vllm.config SpeculativeConfig: method
vllm.config LoadConfig: load_format
vllm.entrypoints.serve.exception_handling.error_response create_error_response: message
vllm.entrypoints.serve.middleware.authenticate AuthenticationMiddleware: verify_token
vllm.distributed get_pp_group:
vllm.distributed tensor_model_parallel_all_gather: dim
vllm.distributed tensor_model_parallel_all_reduce:
vllm.distributed.parallel_state GroupCoordinator: rank_in_group world_size
vllm.distributed.parallel_state get_world_group:
vllm.distributed.parallel_state is_global_first_rank:
vllm.distributed.utils get_pp_indices: num_hidden_layers
vllm.config.offload OffloadConfig: uva prefetch
vllm.config.offload UVAOffloadConfig: cpu_offload_gb
vllm.config.offload PrefetchOffloadConfig: offload_group_size
vllm.exceptions VLLMValidationError: parameter value
vllm.logger init_logger: name
vllm.platforms current_platform: device_type get_device_total_memory is_cpu
vllm LLM: llm_engine
vllm.outputs RequestOutput: request_id outputs finished
vllm.outputs CompletionOutput: token_ids finish_reason
vllm.sampling_params RequestOutputKind: DELTA
vllm.sampling_params SamplingParams: extra_args max_tokens seed detokenize output_kind
vllm.v1.engine.llm_engine LLMEngine: add_request step has_unfinished_requests
vllm.compilation.breakable_cudagraph eager_break_during_capture:
vllm.forward_context get_forward_context:
vllm.forward_context ForwardContext: no_compile_layers
vllm.model_executor.layers.linear ColumnParallelLinear: input_size output_size quant_method bias skip_bias_add return_bias
vllm.model_executor.layers.linear MergedColumnParallelLinear: output_sizes
vllm.model_executor.layers.linear RowParallelLinear: input_size output_size quant_method bias skip_bias_add return_bias tp_rank tp_size reduce_results
vllm.model_executor.layers.linear UnquantizedLinearMethod:
vllm.utils.torch_utils direct_register_custom_op: mutates_args fake_impl target_lib
vllm.lora.worker_manager WorkerLoRAManager: _adapter_manager
vllm.lora.lora_model LoRAModel: loras
vllm.lora.request LoRARequest: lora_name
vllm.v1.request Request: request_id status sampling_params block_hashes num_prompt_tokens num_tokens num_computed_tokens num_output_tokens num_output_placeholders max_tokens next_decode_eligible_step resumable
vllm.v1.request RequestStatus: RUNNING
vllm.v1.core.sched.output SchedulerOutput: num_scheduled_tokens finished_req_ids scheduled_cached_reqs
vllm.v1.core.sched.output CachedRequestData: req_ids num_computed_tokens
vllm.v1.core.sched.output NewRequestData: req_id sampling_params prompt_len
vllm.v1.core.sched.async_scheduler AsyncScheduler:
vllm.v1.core.sched.scheduler Scheduler: vllm_config block_size hash_block_size kv_cache_manager kv_cache_config requests running current_step max_model_len prev_step_scheduled_req_ids add_request schedule _handle_blocked_waiting_request _get_local_prefix_cache_hit _update_after_schedule reset_prefix_cache
vllm.v1.kv_cache_interface SlidingWindowSpec: sliding_window
vllm.v1.kv_cache_interface KVCacheConfig: kv_cache_groups
vllm.v1.kv_cache_interface KVCacheGroupSpec: kv_cache_spec
vllm.v1.core.kv_cache_manager KVCacheManager: coordinator enable_caching empty_kv_cache_blocks create_kv_cache_blocks prefix_cache_lookup_enabled
vllm.v1.core.kv_cache_coordinator KVCacheCoordinator: find_longest_cache_hit cache_blocks
vllm.v1.worker.gpu_model_runner GPUModelRunner: vllm_config input_batch requests
vllm.v1.worker.gpu_input_batch InputBatch: req_ids num_reqs num_prompt_tokens num_computed_tokens_cpu
vllm.v1.worker.gpu_input_batch CachedRequestState: sampling_params
vllm.v1.worker.gpu.model_states resolve_model_state_cls: vllm_config model
vllm.v1.worker.gpu.model_states.interface ModelState: add_request remove_request preprocess_state prepare_attn
vllm.v1.worker.gpu.model_states.interface ModelState.add_request: req_index new_req_data
vllm.v1.worker.gpu.model_states.interface ModelState.remove_request: req_id
vllm.v1.worker.gpu.model_states.interface ModelState.preprocess_state: input_batch
vllm.v1.worker.gpu.model_runner GPUModelRunner: vllm_config model_state req_states
vllm.v1.worker.gpu.states RequestState: req_id_to_index prefill_len num_computed_tokens num_computed_tokens_np
vllm.v1.worker.gpu.buffer_utils UvaBackedTensor: np copy_to_uva
vllm.v1.worker.gpu.buffer_utils StagedWriteTensor: stage_write_elem apply_write
vllm.v1.worker.gpu.input_batch InputBatch: req_ids num_computed_tokens_np num_scheduled_tokens num_tokens_after_padding
"""  # noqa: E501


def _use(line: str) -> Symbol:
    place, _, needs = line.partition(":")
    module, name = place.split()
    return Symbol(module, name, tuple(needs.split()))


USES = tuple(map(_use, _USES.strip().splitlines()))


def wrap(seam: Seam, wrapper: Callable[..., Any]) -> None:
    """Replace the symbol by `wrapper(original, *args, **kwargs)`, once.

    Raises CapreseError naming the symbol when this vLLM does not have it as expected.
    """
    check(seam)
    owner, attribute = seam.owner(), seam.attribute
    found = inspect.getattr_static(owner, attribute)
    original = getattr(owner, attribute)
    if getattr(original, "__caprese__", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.__caprese__ = True  # type: ignore[attr-defined]
    setattr(owner, attribute, staticmethod(wrapped) if isinstance(found, staticmethod) else wrapped)


def check(symbol: Symbol) -> None:
    """Raise CapreseError unless the symbol exists and has what we rely on."""
    try:
        original = getattr(symbol.owner(), symbol.attribute)
    except (ImportError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
    else:
        missing = [name for name in symbol.needs if not _has(original, name)]
        if not missing:
            return
        found = f"no {', '.join(missing)}"
    raise CapreseError(
        f"vLLM's {symbol.path}",
        expected=f"it as in vLLM {PROVEN_VLLM}",
        found=found,
        fix=f"install vllm=={PROVEN_VLLM}.*",
    )


def _has(symbol: Any, name: str) -> bool:
    """Whether a function has the parameter, or a class or its instances, or another object, have the attribute."""
    if inspect.isroutine(symbol):
        return name in inspect.signature(symbol).parameters
    kind = symbol if isinstance(symbol, type) else type(symbol)  # current_platform answers to any name with None
    if hasattr(kind, name):
        return True
    assigned = re.compile(rf"\bself\.{name}(: [^=\n]+)? = |^    {name}: ", re.MULTILINE)
    classes = (c for c in inspect.getmro(kind) if c.__module__.startswith("vllm."))
    return any(assigned.search(inspect.getsource(c)) for c in classes)


def check_version(version: str) -> str | None:
    """A warning, if Caprese is not proven with this vLLM; None if it is.

    A release whose source was read runs with the warning. Any other does so with CAPRESE_ANY_VLLM=1 alone.
    Raises CapreseError otherwise, and whenever a release that is not proven lacks a symbol that we touch.
    """
    release = ".".join(version.split(".")[:2])
    if release == PROVEN_VLLM:
        return None
    if release not in READ_VLLM and os.environ.get("CAPRESE_ANY_VLLM") != "1":
        raise CapreseError(
            "vLLM",
            expected=f"version {PROVEN_VLLM}, the one that Caprese is proven with, or {', '.join(READ_VLLM)}",
            found=version,
            fix=f"install vllm=={PROVEN_VLLM}.*, or set CAPRESE_ANY_VLLM=1 and compare outputs yourself",
        )
    for symbol in (*SEAMS, *USES):
        check(symbol)
    return f"vLLM {version} has every symbol that Caprese touches, but Caprese is proven with {PROVEN_VLLM} only"
