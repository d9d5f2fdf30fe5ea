"""Turning Caprese on: validate, resolve, refuse, and put the result where every process finds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from vllm.config import CUDAGraphMode
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.platforms import current_platform

from caprese_kernels import __version__
from caprese_kernels.adapters import Adapters, find_adapter
from caprese_kernels.backend import choose
from caprese_kernels.config import ACTIVATIONS, BaseModelInfo, CapreseConfig, Method, activation_of, resolve
from caprese_kernels.errors import CapreseError

from . import compat
from .flags import KEY

logger = init_logger("vllm.caprese")

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM")
LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "dummy")
WORKER_EXTENSION = "caprese_vllm.worker.WorkerExtension"
FF_OP = "caprese::ff"


def create_engine_config(original: Callable[..., Any], args: Any, settings: Any, *rest: Any, **kwargs: Any) -> Any:
    """vLLM's configuration with Caprese in it; raises CapreseError for whatever does not fit.

    All checks that need no built model happen here, in the first process, so that a mistake costs
    seconds and one line, and leaves no half-started server.
    """
    config = CapreseConfig.parse(settings, f'additional_config["{KEY}"]')
    _refuse_config(config)
    adapters = None
    if config.weights is not None:
        path = find_adapter(config.weights)
        adapters = Adapters.load(path)
        config = config.model_copy(update={"weights": str(path)})
    _refuse_arguments(args)
    # Statistics of cached tokens are not kept yet, so no request may skip them, and what sparse
    # decoding wrote must not be reused as if it were exact: no prefix cache at all.
    if args.enable_prefix_caching is not False:
        logger.info("Caprese: prefix caching is turned off; it does not work together with Caprese yet")
    args.enable_prefix_caching = False

    vllm_config = original(args, *rest, **kwargs)

    _refuse_engine(vllm_config)
    hf_config = vllm_config.model_config.hf_text_config
    served = BaseModelInfo.from_hf(hf_config, vllm_config.model_config.model)
    served.architecture = vllm_config.model_config.architectures[0]
    method, warnings = resolve(config, adapters.config if adapters else None, served)
    for warning in warnings:
        logger.warning("Caprese: %s", warning)

    _keep_op_out_of_graphs(vllm_config)
    vllm_config.parallel_config.worker_extension_cls = WORKER_EXTENSION
    vllm_config.additional_config[KEY] = {
        **config.model_dump(),
        "method": method.name,
        "density": method.density,
        "layers": list(method.layers),
        "rank": method.rank,
        "version": __version__,
    }
    compat.wrap(compat.ADD_ENDPOINTS, _with_route)
    compat.wrap(compat.VALIDATE_PARAMS, _validate_params)
    return vllm_config


def method_of(settings: dict[str, Any]) -> Method:
    """The resolved method, read back in a worker."""
    return Method(settings["method"], settings["density"], tuple(settings["layers"]), settings["rank"])


def _with_route(original: Callable[..., Any], supported_tasks: Any = None) -> Any:
    from .route import CapreseRoute

    return [*original(supported_tasks), CapreseRoute()]


def _validate_params(original: Callable[..., Any], self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse a wrong `vllm_xargs: {"caprese": ...}`: HTTP 400."""
    result = original(self, params, *args, **kwargs)
    extra = getattr(params, "extra_args", None) or {}
    if KEY in self.vllm_config.additional_config and extra.get(KEY, "off") != "off":
        error = CapreseError(
            'vllm_xargs["caprese"]',
            expected="'off', or no such key",
            found=repr(extra[KEY]),
            fix="leave it out to run the request sparse",
        )
        raise VLLMValidationError(str(error), parameter="vllm_xargs", value=extra[KEY])  # other errors are HTTP 500
    return result


def _keep_op_out_of_graphs(vllm_config: Any) -> None:
    """The FF op decides in Python which rows run sparse: it may be compiled around, never captured."""
    compilation = vllm_config.compilation_config
    if compilation.splitting_ops:
        compilation.splitting_ops.append(FF_OP)
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
        mode = CUDAGraphMode.PIECEWISE if compilation.splitting_ops else CUDAGraphMode.NONE
        logger.info("Caprese: cudagraph_mode %s becomes %s", compilation.cudagraph_mode, mode)
        compilation.cudagraph_mode = mode


def _refuse_config(config: CapreseConfig) -> None:
    if config.reselect_interval is not None:
        raise CapreseError(
            "reselect_interval",
            expected="null",
            found=str(config.reselect_interval),
            fix="reselection is not available yet",
        )
    choose(config.kernel, torch.device(current_platform.device_type))  # raises; compiles before workers need it


def _refuse_arguments(args: Any) -> None:
    """What must be refused before vLLM looks at it, because vLLM may fail on it first, and at length."""
    quantization = args.quantization or _quantized(Path(args.model) / "config.json")
    if quantization:
        _refuse_feature(f"quantization {quantization}", "serve unquantized weights")
    if args.worker_extension_cls:
        raise CapreseError(
            "--worker-extension-cls",
            expected="none: Caprese uses it",
            found=args.worker_extension_cls,
            fix="drop the flag",
        )


def _refuse_engine(vllm_config: Any) -> None:
    """Refuse, by name, what Caprese was not shown to work with (design invariant 7)."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    offload, act = vllm_config.offload_config, activation_of(model.hf_text_config)
    # feature, whether it is in use, what to do
    refused = [
        (f"architecture {model.architectures[0]}", model.architectures[0] not in ARCHITECTURES, _one_of(ARCHITECTURES)),
        (f"model implementation {model.model_impl}", model.model_impl not in ("auto", "vllm"), "drop --model-impl"),
        (f"runner type {model.runner_type}", model.runner_type != "generate", "serve a generating model"),
        (f"activation {act}", act not in ACTIVATIONS, _one_of(ACTIVATIONS)),
        (f"quantization {model.quantization}", model.quantization is not None, "serve unquantized weights"),
        ("tensor parallelism", parallel.tensor_parallel_size > 1, "use --tensor-parallel-size 1"),
        ("pipeline parallelism", parallel.pipeline_parallel_size > 1, "use --pipeline-parallel-size 1"),
        ("data parallelism", parallel.data_parallel_size > 1, "start one server a replica"),
        ("decode context parallelism", parallel.decode_context_parallel_size > 1, "drop the flag"),
        ("prefill context parallelism", parallel.prefill_context_parallel_size > 1, "drop the flag"),
        ("micro-batching", parallel.use_ubatching, "drop --enable-dbo and --ubatch-size"),
        ("speculative decoding", vllm_config.speculative_config is not None, "drop --speculative-config"),
        ("LoRA", vllm_config.lora_config is not None, "drop --enable-lora"),
        ("KV transfer", vllm_config.kv_transfer_config is not None, "drop --kv-transfer-config"),
        ("KV-sharing fast prefill", vllm_config.cache_config.kv_sharing_fast_prefill, "drop the flag"),
        ("run-time weight transfer", vllm_config.weight_transfer_config is not None, "drop the flag"),
        ("sleep mode", model.enable_sleep_mode, "drop --enable-sleep-mode"),
        ("prompt embeddings", model.enable_prompt_embeds, "drop --enable-prompt-embeds"),
        (
            "weight offloading",
            offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0,
            "drop the offloading flags",
        ),
        (
            f"load format {vllm_config.load_config.load_format}",
            str(vllm_config.load_config.load_format) not in LOAD_FORMATS,
            _one_of(LOAD_FORMATS),
        ),
    ]
    for feature, in_use, fix in refused:
        if in_use:
            _refuse_feature(feature, fix)


def _refuse_feature(feature: str, fix: str) -> NoReturn:
    raise CapreseError("Caprese", expected="an engine it is proven with", found=feature, fix=fix)


def _quantized(config: Path) -> str | None:
    """How a local checkpoint says that its weights are quantized."""
    try:
        settings = json.loads(config.read_text())["quantization_config"]
        return str(settings["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a Hub id, no quantization, or a file that vLLM will complain about


def _one_of(names: Any) -> str:
    return f"use one of {', '.join(names)}"
