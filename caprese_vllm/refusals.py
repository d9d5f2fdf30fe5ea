"""Checks before any process starts: refuse by name what Caprese is not proven to work with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import torch
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform

from caprese_kernels import files
from caprese_kernels.backend import Backend, choose
from caprese_kernels.config import ACTIVATIONS, CapreseConfig, Method, activation_of, find_architecture
from caprese_kernels.errors import CapreseError
from caprese_kernels.reference import griffin_count

from . import ff_kernels
from .architectures import ARCHITECTURES

LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "dummy")


def check_config(config: CapreseConfig) -> Backend:
    """The built-in kernels that this configuration asks for; raises CapreseError for those that cannot be had."""
    if config.kernel_extension is not None:
        ff_kernels.find(config.kernel_extension)
    return choose(config.kernel, torch.device(current_platform.device_type))  # raises; compiles before workers need it


def check_arguments(args: Any) -> None:
    """Refuse what vLLM's own configuration would fail on first, with a long traceback; raises CapreseError."""
    files.check_model(args.model)
    settings = _model_settings(Path(args.model) / "config.json")
    if settings and not args.hf_overrides:
        named = find_architecture(settings.get("architectures"), args.model)
        if named not in ARCHITECTURES:
            _refuse_feature(f"architecture {named}", _one_of(ARCHITECTURES))
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


def check_engine(vllm_config: Any) -> None:
    """Raise CapreseError, with its name, for a feature that Caprese is not proven to work with."""
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
            "drop --enable-lora: vLLM's wrappers would bypass the blocks that Caprese replaces",
        ),
        # The replicas are independent engines and would run, but GET /caprese asks only one, and no test runs two.
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


def check_reselection(method: Method, vllm_config: Any) -> None:
    """Raise CapreseError, with the reason, for an engine in which requests cannot select anew."""
    model, limit = vllm_config.model_config, vllm_config.model_config.max_model_len
    window = model.get_sliding_window()
    # vLLM keeps all blocks where layers with a window and others share one kind of block.
    mixed = "full_attention" in (getattr(model.hf_text_config, "layer_types", None) or ())
    kept = mixed and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    # whether it is so, what is expected, what was found, what to do
    refused = [
        (
            not method.needs_statistic,
            "neurons that a request chooses for itself",
            f"prior {method.prior:g}, core {method.core:g}: all requests share one selection, which no text changes",
            "leave it out, or choose a core below 1",
        ),
        (
            window is not None and window < limit and not kept,
            "KV blocks that stay: a round computes tokens again, and attends to those before",
            f"layers that drop what is behind a window of {window} tokens",
            f"leave it out, {'add --disable-hybrid-kv-cache-manager, ' if mixed else ''}or --disable-sliding-window",
        ),
        (
            vllm_config.speculative_config is not None,
            "one token a step: drafts would cross a round's end",
            "speculative decoding",
            "leave one of them out",
        ),
        (
            vllm_config.parallel_config.pipeline_parallel_size > 1,
            "an engine in which rounds were tested",
            "pipeline parallelism",
            "leave one of them out",
        ),
    ]
    for is_so, expected, found, fix in refused:
        if is_so:
            raise CapreseError("reselect_interval", expected=expected, found=found, fix=fix)


def check_tensor_parallel(method: Method, intermediate_size: int, ranks: int) -> None:
    """Raise CapreseError unless F divides by the ranks, and GRIFFIN keeps floor(d F / ranks) >= 1 neurons of each."""
    if intermediate_size % ranks:
        raise CapreseError(
            "tensor parallelism",
            expected=f"a size that divides the model's {intermediate_size} neurons",
            found=str(ranks),
            fix="use another --tensor-parallel-size",
        )
    least = min(method.densities or (method.density,))
    if method.name == "griffin" and griffin_count(least, intermediate_size // ranks) < 1:
        raise CapreseError(
            "density",
            expected=f"at least one of each rank's {intermediate_size // ranks} neurons kept",
            found=f"{least:g}",
            fix=f"use {ranks / intermediate_size:.4g} or more, or a smaller --tensor-parallel-size",
        )


def _refuse_feature(feature: str, fix: str) -> NoReturn:
    raise CapreseError("Caprese", expected="an engine it is proven with", found=feature, fix=fix)


def _refuse_quantized_blocks(method: str | None, settings: str) -> None:
    """Refuse quantized FF weights: the kernels read rows of plain floating-point numbers.

    Settings that mention FF blocks may exclude them from quantization: `find_block` checks each one later.
    """
    if method and not any(name in settings for name in ("mlp", "feed_forward", "fc1")):
        _refuse_feature(
            f"quantization {method} of FF weights",
            "leave FF blocks out of the quantization, or serve unquantized weights",
        )


def _model_settings(config: Path) -> dict[str, Any]:
    """A local model's config.json, which may hold what transformers writes and is no JSON: NaN and Infinity."""
    try:
        settings = json.loads(files.read_bytes(config, files.MAX_MODEL_CONFIG))
    except (OSError, ValueError, RecursionError):
        return {}  # a Hub id, or a file that vLLM will report
    return settings if isinstance(settings, dict) else {}


def _one_of(names: Any) -> str:
    return f"use one of {', '.join(names)}"
