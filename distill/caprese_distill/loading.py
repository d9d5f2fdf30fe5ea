"""Loads what the settings name: device, configuration, tokenizer, weights. A mistake raises CapreseError."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from caprese_kernels import files
from caprese_kernels.errors import CapreseError
from caprese_kernels.memory import out_of_memory


def find_device(device: str) -> torch.device:
    """The device by its name; "auto" is cuda if there is a GPU, else cpu."""
    if device == "cuda" and not torch.cuda.is_available():
        raise CapreseError("--device", expected="a GPU that torch can use", found="none", fix="use --device cpu")
    return torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def load_small_parts(model: str) -> tuple[Any, Any]:
    """The model's configuration and tokenizer."""
    files.check_model(model)
    if not Path(model).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise CapreseError(
            "model", expected="a directory or a Hub id (owner/name)", found=f"no directory {model}", fix="correct it"
        )
    from transformers import AutoConfig, AutoTokenizer

    try:
        return AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except Exception as error:  # OSError, ValueError, KeyError, errors of the file formats ...
        raise _unloadable(model, error) from None


def load_skeleton(model: str, config: Any, dtype: str) -> Any:
    """The model without weights, on torch's meta device: shapes and dtypes at no cost."""
    from transformers import AutoModelForCausalLM

    wanted = stored_dtype(config) if dtype == "auto" else getattr(torch, dtype)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config),  # from_config changes it
                dtype=wanted,
                attn_implementation=_attention(config),
            )
    except Exception as error:  # as below
        raise _unloadable(model, error) from None


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype of the checkpoint's weights, from its configuration."""
    return getattr(config.get_text_config(), "dtype", None) or torch.float32


def max_sample_tokens(config: Any, max_length: int) -> int:
    """The most tokens of a sample: `max_length`, or the number of the model's positions if that is less."""
    return min(max_length, getattr(config.get_text_config(), "max_position_embeddings", None) or max_length)


def load_model(model: str, dtype: str, device_map: str | dict[str, str] | None = None, **options: Any) -> Any:
    """The causal language model in `dtype` ("auto": the checkpoint's); CapreseError if a weight is missing.

    accelerate spreads it over devices by `device_map`; `options` are further arguments of from_pretrained.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        network, info = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            attn_implementation=_attention(AutoConfig.from_pretrained(model)),
            **options,
        )
    except Exception as error:  # as above
        if out_of_memory(error):
            raise memory_error(error) from None
        raise _unloadable(model, error) from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise _unloadable(model, f"{len(missing)} weights are missing, first {missing[0]}")
    return network


def load_model_on(model: str, dtype: str, device: str | torch.device) -> Any:
    """`load_model`, moved to the device."""
    return load_model(model, dtype).to(device)


def memory_error(error: BaseException) -> CapreseError:
    """What is reported of `out_of_memory`."""
    return CapreseError(
        "device memory" if isinstance(error, torch.OutOfMemoryError) else "memory",
        expected="enough for the model and a sample",
        found=shorten(str(error), 250) or type(error).__name__,
        fix="use a lower --max-length, a smaller --dtype, fewer --layers, or --stage layer-wise",
    )


def _attention(config: Any) -> str | None:
    """The attention to load: "eager" for a model with capped scores (Gemma 2), else the default. torch's fused one
    cannot cap scores, and transformers then omits the cap silently."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _unloadable(model: str, error: Exception | str) -> CapreseError:
    found = error if isinstance(error, str) else f"{type(error).__name__}: {shorten(str(error), 250)}"
    return CapreseError(
        f"model {model}",
        expected="a causal language model that transformers loads",
        found=found,
        fix="check the directory",
    )
