"""Every vLLM symbol that the plugin wraps: its name, why, and when the wrap can go.

vLLM 0.32. `wrap` is the only place where vLLM is changed; it is idempotent and checks what it finds.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from caprese_kernels.errors import CapreseError

SUPPORTED_VLLM = "0.32"


@dataclass(frozen=True)
class Seam:
    """A wrapped symbol. `parameters` are those that our wrapper relies on, by name."""

    module: str
    name: str
    parameters: tuple[str, ...]
    why: str
    until: str

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
SEAMS = tuple(value for value in globals().values() if isinstance(value, Seam))


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


def check(seam: Seam) -> None:
    """Raise CapreseError unless the symbol exists and has the parameters that we rely on."""
    try:
        original = getattr(seam.owner(), seam.attribute)
        parameters = inspect.signature(original).parameters
    except (ImportError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
    else:
        missing = [name for name in seam.parameters if name not in parameters]
        if not missing:
            return
        found = f"no parameter {', '.join(missing)}"
    raise CapreseError(
        f"vLLM's {seam.path}",
        expected=f"it as in vLLM {SUPPORTED_VLLM}",
        found=found,
        fix=f"install vllm=={SUPPORTED_VLLM}.* (the symbol {seam.why})",
    )
