"""What Caprese was not shown to work with, refused by name before any process starts (design invariant 7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import torch
from vllm.platforms import current_platform

from caprese_kernels.backend import choose
from caprese_kernels.config import ACTIVATIONS, CapreseConfig, activation_of
from caprese_kernels.errors import CapreseError

from .architectures import ARCHITECTURES

LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "dummy")


def refuse_config(config: CapreseConfig) -> None:
    if config.reselect_interval is not None:
        raise CapreseError(
            "reselect_interval",
            expected="null",
            found=str(config.reselect_interval),
            fix="reselection is not available yet",
        )
    choose(config.kernel, torch.device(current_platform.device_type))  # raises; compiles before workers need it


def refuse_arguments(args: Any) -> None:
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


def refuse_engine(vllm_config: Any) -> None:
    """Refuse, by name, what Caprese was not shown to work with (design invariant 7)."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    offload, act = vllm_config.offload_config, activation_of(model.hf_text_config)
    # feature, whether it is in use, what to do
    refused = [
        (f"architecture {model.architectures[0]}", model.architectures[0] not in ARCHITECTURES, _one_of(ARCHITECTURES)),
        ("mixture of experts", model.get_num_experts() > 0, "serve a model without experts"),
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
