"""A vLLM engine in this process, freed when its block ends; tests/support/environment.py sets its environment."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.transformers.base import Base
from vllm.outputs import CompletionOutput
from vllm.platforms.cpu import CpuPlatform

from tests.support.quick_start import quick_start

# 32 is the smallest block that the CPU's attention likes: short prompts then fill several blocks of the prefix cache.
DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "block_size": 32,
    "disable_log_stats": True,
    "kv_cache_memory_bytes": 64 * 2**20,  # a thousand blocks of the tiny models
}


@contextmanager
def engine(model_dir: Path, caprese: dict[str, Any] | None = None, **options: Any) -> Iterator[LLM]:
    """`LLM(model_dir)`, with `caprese` as the plugin's configuration; None: installed, not enabled."""
    if caprese is not None:
        options["additional_config"] = {"caprese": caprese}
    with quick_start(), transformers_kept():
        llm = LLM(str(model_dir), **(DEFAULTS | options))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()  # collects garbage too


@contextmanager
def transformers_kept() -> Iterator[None]:
    """Undo what vLLM's compiler does, in place, to transformers' classes: the next test's reference is made of them."""
    before: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}
    decorate = Base._decorate_cls_for_torch_compile

    def remember(self: Base, cls: type, *args: Any, **options: Any) -> None:
        before.setdefault(cls, (cls.__bases__, dict(vars(cls))))
        decorate(self, cls, *args, **options)

    try:
        with patch.object(Base, "_decorate_cls_for_torch_compile", remember):
            yield
    finally:
        for cls, (bases, attributes) in before.items():
            for name in set(vars(cls)) - set(attributes):
                delattr(cls, name)
            cls.__init__ = attributes["__init__"]  # type: ignore[misc]
            cls.__bases__ = bases


def greedy(max_tokens: int, caprese: str | None = None) -> SamplingParams:
    """`caprese` is what a client sends in `vllm_xargs`: "off" runs this request dense."""
    extra = None if caprese is None else {"caprese": caprese}
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra)


def generate(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    loras: Sequence[Path | None] | None = None,
) -> list[list[int]]:
    """All prompts as one batch; `loras` names each one's LoRA adapter by its directory, lora1, lora2 ..."""
    requests: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    chosen: Any = loras and [path and LoRARequest(path.name, int(path.name[4:]), str(path)) for path in loras]
    outputs = llm.generate(requests, params, lora_request=chosen, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def with_logprobs(llm: LLM, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[list[list[int]], list[float]]:
    """Greedy tokens of all prompts as one batch, and the logarithms of all their probabilities, one after another."""
    requests: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    outputs = [output.outputs[0] for output in llm.generate(requests, params, use_tqdm=False)]
    return [list(one.token_ids) for one in outputs], [value for one in outputs for value in logprobs_of(one)]


def logprobs_of(sample: CompletionOutput) -> list[float]:
    """Of the sampled tokens, with `logprobs=0` in the request."""
    return [next(iter(entry.values())).logprob for entry in sample.logprobs or []]


def force_async_scheduling(patch: pytest.MonkeyPatch) -> None:
    """The CPU platform turns asynchronous scheduling off; the GPU's default is on."""
    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))


def scheduler(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def leaks(llm: LLM) -> dict[str, int]:
    """What is left of requests when none is live, by name; empty if nothing is."""
    state = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model.caprese
    inner = scheduler(llm)
    blocks = inner.kv_cache_manager.block_pool
    left = {
        "slots": len(state.requests),
        "slots not free": state.requests.num_slots - len(state.requests._free),
        "statistics": sum(len(block.statistics._rows) for block in state.blocks),
        "exact statistics": sum(len(block.statistics._exact) for block in state.blocks),
        "the scheduler's requests": len(inner.requests),
        "leaders": len(getattr(inner, "leaders", ())),
        "KV blocks": blocks.num_gpu_blocks - 1 - blocks.get_num_free_blocks(),  # one is vLLM's null block
    }
    return {name: count for name, count in left.items() if count}
