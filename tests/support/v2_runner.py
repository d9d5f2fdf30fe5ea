"""Run as a program: vLLM's V2 model runner (the default on GPUs) on a CPU, through Triton's interpreter.

With --v1 it is the V1 runner as it comes, for what must not share a process with other engines.
Reads a JSON job {model, caprese, engine, prompts, new_tokens} on standard input and writes, as its last line, the
tokens (with "logprobs" in the job, their probabilities too) and what the plugin reports. Triton's interpreter must be
chosen before Triton is imported: hence a process.
"""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


class Driver:
    """Enough of a Triton driver for vLLM to call Triton available."""

    @staticmethod
    def is_active() -> bool:
        return True


if "--v1" not in sys.argv:
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    import triton.backends

    triton.backends.backends.setdefault("cpu", types.SimpleNamespace(driver=Driver, compiler=None))
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def take_integer_masks() -> None:
    """The interpreter refuses masks of integers, which vLLM's n-gram kernel makes; compiled Triton takes them."""
    load = InterpreterBuilder.create_masked_load

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        return load(self, ptrs, TensorHandle(mask.data.astype(bool), mask.dtype), *rest)

    InterpreterBuilder.create_masked_load = masked_load


def count_preemptions(scheduler: Any) -> list[str]:
    """The requests that lose their blocks from now on."""
    preempted: list[str] = []
    original = scheduler._preempt_request

    def spy(request: Any, *args: Any, **options: Any) -> Any:
        preempted.append(request.request_id)
        return original(request, *args, **options)

    scheduler._preempt_request = spy
    return preempted


def count_loads(scheduler: Any) -> list[str]:
    """The requests that begin with a page of statistics from now on."""
    loaded: list[str] = []
    original = scheduler.schedule

    def spy(*args: Any, **options: Any) -> Any:
        output = original(*args, **options)
        commands = getattr(output, "caprese_pages", {})
        loaded.extend(request_id for request_id, command in commands.items() if command.load is not None)
        return output

    scheduler.schedule = spy
    return loaded


def main() -> None:
    job = json.load(sys.stdin)
    if "--v1" not in sys.argv:
        take_integer_masks()
    from tests.support.engine import engine, force_async_scheduling, generate, greedy, with_logprobs

    if job.get("async"):
        force_async_scheduling(pytest.MonkeyPatch())
    results: dict[str, Any] = {}
    with engine(job["model"], job["caprese"], **job["engine"]) as llm:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        results["v2"] = any(c.__module__ == "vllm.v1.worker.gpu.model_runner" for c in type(runner).__mro__)
        preempted = count_preemptions(llm.llm_engine.engine_core.engine_core.scheduler)
        loaded = count_loads(llm.llm_engine.engine_core.engine_core.scheduler)
        loras = [path and Path(path) for path in job.get("loras", [])]
        if job.get("logprobs"):
            results["tokens"], results["logprobs"] = with_logprobs(llm, job["prompts"], job["new_tokens"])
        else:
            results["tokens"] = generate(llm, job["prompts"], greedy(job["new_tokens"]), loras or None)
        results["preempted"] = len(preempted)
        results["loaded"] = len(loaded)
        results["async"] = llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        metrics = llm.get_metrics() if llm.llm_engine.log_stats else []
        results["counters"] = {metric.name: metric.value for metric in metrics if hasattr(metric, "value")}
        if job["caprese"] is not None:
            results["report"] = llm.collective_rpc("caprese_report")[0]
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
