"""What a sparse Hugging Face model does not do: refused by name, in one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from caprese_kernels.errors import CapreseError, quote

# Settings of `generate` by which several tokens are proposed and checked in one pass.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def check_generate(model: Any, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise CapreseError for arguments of `model.generate` that hide which tokens are generated."""
    given = dict(inspect.signature(generate).bind_partial(*args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    configs = (given.get("generation_config"), model.generation_config)

    def setting(name: str) -> Any:
        found = (given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if value is not None), None)

    for name in ASSISTED:
        if setting(name):
            _refuse(name, "none: a proposed token would run as a prompt's", "given", "leave it out")
    if setting("use_cache") is False:
        _refuse("use_cache", "True: without a cache every pass is a new prompt's", "False", "leave it out")
    chunk, prompt = setting("prefill_chunk_size"), given.get("inputs", given.get("input_ids"))
    if chunk and prompt is not None and (chunk == 1 or prompt.shape[1] % chunk == 1):
        found = f"{chunk} for prompts of {prompt.shape[1]} positions"
        _refuse("prefill_chunk_size", "a last chunk of more than one position", found, "choose another")


def check_cache(cache: Any) -> None:
    """Raise CapreseError for a KV cache that does not grow with its tokens."""
    from transformers import Cache

    if cache is not None and (not isinstance(cache, Cache) or cache.is_compileable):
        fix = "use the default cache, or cache_implementation='dynamic'"
        _refuse("past_key_values", "a cache that grows, as DynamicCache", type(cache).__name__, fix)


def check_mask(mask: Any, rows: int, width: int) -> None:
    """Raise CapreseError for an attention mask that does not say which positions are padding."""
    if mask is None:
        return
    shape = tuple(getattr(mask, "shape", ()))
    if len(shape) != 2 or shape[0] != rows or shape[1] < width:
        found = f"shape {shape}" if shape else type(mask).__name__
        _refuse("attention_mask", f"a mask of padding, {rows} rows of {width} positions or more", found, "give that")


def refuse_cache(found: str) -> None:
    """Raise CapreseError for a cache whose positions were not all seen, by these rows, in this order of lengths."""
    expected = "the cache of the last pass over the same rows, neither copied nor cropped"
    _refuse("past_key_values", expected, found, "give the whole text as a prompt, without a cache")


def check_settings(settings: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise CapreseError for settings that are not the method's."""
    surplus = sorted(set(settings) - set(known))
    if surplus:
        _refuse("apply()", f"settings among {', '.join(known)}", quote(surplus), "leave out what only an engine has")


def _refuse(where: str, expected: str, found: str, fix: str) -> None:
    raise CapreseError(where, expected=expected, found=found, fix=fix)
