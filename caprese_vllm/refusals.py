"""What Caprese was not shown to work with, refused by name before any process starts (design invariant 7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import torch
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform

from caprese_kernels.backend import Backend, choose
from caprese_kernels.config import ACTIVATIONS, CapreseConfig, Method, activation_of
from caprese_kernels.errors import CapreseError
from caprese_kernels.reference import griffin_count

from .architectures import ARCHITECTURES

LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "dummy")


def refuse_config(config: CapreseConfig) -> Backend:
    """The kernels that this configuration asks for."""
    if config.reselect_interval is not None:
        raise CapreseError(
            "reselect_interval",
            expected="null",
            found=str(config.reselect_interval),
            fix="reselection is not available yet",
        )
    return choose(config.kernel, torch.device(current_platform.device_type))  # raises; compiles before workers need it


def refuse_arguments(args: Any) -> None:
    """What must be refused before vLLM looks at it, because vLLM may fail on it first, and at length."""
    settings = _model_settings(Path(args.model) / "config.json")
    named = settings.get("architectures")
    if named and named[0] not in ARCHITECTURES and not args.hf_overrides:
        _refuse_feature(f"architecture {named[0]}", _one_of(ARCHITECTURES))
    quantized = settings.get("quantization_config") or {}
    _refuse_quantized_blocks(
        args.quantization or quantized.get("quant_method"), f"{quantized} {args.quantization_config}"
    )
    if args.enable_sleep_mode:
        _refuse_feature("sleep mode", "drop --enable-sleep-mode")
    ours = {"--worker-extension-cls": args.worker_extension_cls, "--scheduler-cls": args.scheduler_cls}
    for flag, given in ours.items():
        if given:
            raise CapreseError(flag, expected="none: Caprese uses it", found=str(given), fix="drop the flag")


def refuse_engine(vllm_config: Any) -> None:
    """Refuse, by name, what Caprese was not shown to work with (design invariant 7)."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    offload, act = vllm_config.offload_config, activation_of(model.hf_text_config)
    drafter = getattr(vllm_config.speculative_config, "method", None)
    # feature, whether it is in use, what to do
    refused = [
        (f"architecture {model.architectures[0]}", model.architectures[0] not in ARCHITECTURES, _one_of(ARCHITECTURES)),
        ("mixture of experts", model.get_num_experts() > 0, "serve a model without experts"),
        (f"model implementation {model.model_impl}", model.model_impl not in ("auto", "vllm"), "drop --model-impl"),
        (f"runner type {model.runner_type}", model.runner_type != "generate", "serve a generating model"),
        (f"activation {act}", act not in ACTIVATIONS, _one_of(ACTIVATIONS)),
        (
            "tensor together with pipeline parallelism",
            parallel.tensor_parallel_size > 1 and parallel.pipeline_parallel_size > 1,
            "use one of them",
        ),
        (
            "LoRA for an architecture whose FF blocks are part of its decoder layers",
            vllm_config.lora_config is not None and getattr(ARCHITECTURES.get(model.architectures[0]), "inline", False),
            "drop --enable-lora: vLLM's wrappers would go around what Caprese puts there",
        ),
        # Its engines are apart and would run; but GET /caprese asks one of them, and no test runs two.
        ("data parallelism", parallel.data_parallel_size > 1, "start one server a replica"),
        ("decode context parallelism", parallel.decode_context_parallel_size > 1, "drop the flag"),
        ("prefill context parallelism", parallel.prefill_context_parallel_size > 1, "drop the flag"),
        ("micro-batching", parallel.use_ubatching, "drop --enable-dbo and --ubatch-size"),
        (f"speculative decoding by {drafter}", drafter not in (None, "ngram"), "use method ngram, or none"),
        ("KV transfer", vllm_config.kv_transfer_config is not None, "drop --kv-transfer-config"),
        ("KV-sharing fast prefill", vllm_config.cache_config.kv_sharing_fast_prefill, "drop the flag"),
        ("run-time weight transfer", vllm_config.weight_transfer_config is not None, "drop the flag"),
        ("prompt embeddings", model.enable_prompt_embeds, "drop --enable-prompt-embeds"),
        (
            "cudagraph_mode FULL, whose graphs hold prompts and generated tokens alike",
            vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL,
            "use FULL_AND_PIECEWISE, or FULL_DECODE_ONLY where vLLM made it FULL because splitting_ops is empty",
        ),
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
    quantized = f"{getattr(model.hf_config, 'quantization_config', None)} {model.quantization_config}"
    _refuse_quantized_blocks(model.quantization, quantized)


def refuse_split(method: Method, intermediate_size: int, ranks: int) -> None:
    """Tensor parallelism gives each rank F / ranks neurons, of which GRIFFIN keeps floor(density F / ranks)."""
    if intermediate_size % ranks:
        raise CapreseError(
            "tensor parallelism",
            expected=f"a size that divides the model's {intermediate_size} neurons",
            found=str(ranks),
            fix="use another --tensor-parallel-size",
        )
    if method.name == "griffin" and griffin_count(method.density, intermediate_size // ranks) < 1:
        raise CapreseError(
            "density",
            expected=f"at least one of each rank's {intermediate_size // ranks} neurons kept",
            found=f"{method.density:g}",
            fix=f"use {ranks / intermediate_size:.4g} or more, or a smaller --tensor-parallel-size",
        )


def _refuse_feature(feature: str, fix: str) -> NoReturn:
    raise CapreseError("Caprese", expected="an engine it is proven with", found=feature, fix=fix)


def _refuse_quantized_blocks(method: str | None, settings: str) -> None:
    """Kernels gather rows of FF weights as they are. Settings that speak of FF blocks may leave them as they are:
    each block is looked at when the model is built.
    """
    if method and not any(name in settings for name in ("mlp", "feed_forward", "fc1")):
        _refuse_feature(
            f"quantization {method} of FF weights",
            "leave FF blocks out of the quantization, or serve unquantized weights",
        )


def _model_settings(config: Path) -> dict[str, Any]:
    """A local model's config.json."""
    try:
        settings = json.loads(config.read_text())
    except (OSError, ValueError):
        return {}  # a Hub id, or a file that vLLM will complain about
    return settings if isinstance(settings, dict) else {}


def _one_of(names: Any) -> str:
    return f"use one of {', '.join(names)}"
