"""Several vLLM engines at the same time: their settings, how many fit into memory, and starting and stopping them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from caprese_kernels import terminal
from caprese_kernels.errors import CapreseError

from ..lora.served.engine import EXTENSION as LORA
from ..lora.served.engine import variables as lora_environment
from .process import Engine, EngineSettings
from .timed_model import TimedModel, adapter_for
from .variants import Variant

GIB = 2**30


def settings_of(model: TimedModel, variant: Variant, options: dict[str, Any], folder: Path) -> EngineSettings:
    """The settings of the variant's engine. `options` are vLLM's own; files go to `folder`."""
    settings = EngineSettings(model.path, None, options)
    if variant.configured is not None:
        settings = replace(settings, caprese=variant.configured.caprese)
    elif variant.correction == "caprese" or variant.core is not None:
        settings = replace(settings, caprese={"weights": str(adapter_for(model, variant, folder))})
    elif (method := model.method_of(variant)) is not None:
        caprese = {"method": method.name, "density": method.density, "layers": list(method.layers)}
        settings = replace(settings, caprese=caprese)
    if variant.correction == "lora":
        environment = lora_environment(folder, model.lora_as)
        extended = {**(settings.caprese or {}), "kernel_extension": LORA}
        settings = replace(settings, caprese=extended, environment=environment)
    return settings


def engine_options(
    model: TimedModel, device: str, max_len: int, max_seqs: int, kv: float, share: float, eager: bool
) -> dict[str, Any]:
    """vLLM's default settings except for sizes: compiled, and on a GPU with CUDA graphs, unless `eager`.

    `kv` is the KV cache in GiB; `share` the share of a GPU's memory that must be free at the start.
    """
    options: dict[str, Any] = {
        "seed": 0,
        "dtype": model.dtype,
        "skip_tokenizer_init": True,
        "max_model_len": max_len,
        "max_num_seqs": max_seqs,
        "enforce_eager": eager,
    }
    if model.dummy:
        options["load_format"] = "dummy"
    if device == "cuda":
        options |= {"kv_cache_memory_bytes": int(kv * GIB), "gpu_memory_utilization": share}
    return options


def groups(variants: Sequence[Variant], together: int) -> list[list[Variant]]:
    """The variants whose engines run at the same time: at most `together`, with Full in every group, because ratios
    are to Full in the same round. Raises CapreseError if `together` is less than 2."""
    if together < 2:
        raise CapreseError(
            "memory",
            expected="room for two engines, Full and another",
            found=f"room for {together}",
            fix="choose a smaller --arch",
        )
    full, *others = variants
    size = together - 1
    return [[full, *others[i : i + size]] for i in range(0, len(others), size)]


def engines_that_fit(model: TimedModel, device: str, kv_gib: float) -> int:
    """How many engines of the model fit into the free memory."""
    overhead = 4.0 if device == "cuda" else 2.0  # GiB: graphs, workspace and CUDA's own; Python, vLLM and compiled code
    each = model.weights.total * model.itemsize / GIB + kv_gib + overhead
    return int(free_gib(device) / each)


def free_gib(device: str) -> float:
    """Free memory of the GPU or the machine, in GiB."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] / GIB
    import psutil

    return psutil.virtual_memory().available / GIB


def kv_gib(model: TimedModel, tokens: int) -> float:
    """GiB of KV cache for `tokens` tokens, with a tenth to spare; at least 1."""
    return max(1.0, 1.1 * model.weights.kv * model.itemsize * tokens / GIB)


@contextmanager
def running(
    settings: Mapping[str, EngineSettings], device: str, kv: float, logs: Path, benchmark: str
) -> Iterator[dict[str, Engine]]:
    """Starts an engine for each of `settings`; on a CPU two at a time, because compiling needs its cores.

    On a CPU an engine runs in the process that sends it requests, which leaves both cores to the model; on a GPU vLLM's
    default is faster. Logs are BENCHMARK-NAME.log in `logs`, removed if the block ends without an exception.
    """
    cpu = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(kv))}
    at_once, environment = (len(settings), {}) if device == "cuda" else (2, cpu)
    paths = {name: logs / f"{benchmark}-{name}.log" for name in settings}
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        names = list(settings)
        for begin in range(0, len(names), at_once):
            part = names[begin : begin + at_once]
            with terminal.notes().status(f"starting engines: {', '.join(part)}"):
                for name in part:
                    own = replace(settings[name], environment=environment | dict(settings[name].environment))
                    engines[name] = stack.enter_context(Engine(paths[name], own))
                for name in part:
                    engines[name].wait_until_ready()
        yield engines
    for path in paths.values():
        path.unlink()
