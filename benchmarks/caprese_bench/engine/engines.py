"""The engines that the latency benchmark sets side by side: variants, the model they serve, who runs together."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from caprese_kernels.adapters import find_adapter, read_config
from caprese_kernels.config import DEFAULT_LAYERS, AdapterConfig, BaseModelInfo, LayerChoice, MethodName, resolve_layers
from caprese_kernels.errors import CapreseError

from ..kernels.floor import Weights
from ..lora.served.engine import EXTENSION as LORA
from ..lora.served.engine import variables as lora_environment
from .models import write_arch
from .process import Engine

GIB = 2**30


@dataclass(frozen=True)
class Variant:
    """A column of table 4. `layers` None: the method's own, first half for GRIFFIN and all for CATS."""

    id: str
    label: str
    method: MethodName | None = None
    correction: Literal["lora", "caprese"] | None = None
    layers: LayerChoice | None = None


VARIANTS = {
    variant.id: variant
    for variant in (
        Variant("full", "Full"),
        Variant("griffin", "GRIFFIN", "griffin"),
        Variant("lora", "LoRA", "griffin", "lora"),
        Variant("caprese", "Caprese (GRIFFIN)", "griffin", "caprese"),
        Variant("caprese-all", "Caprese (GRIFFIN, all layers)", "griffin", "caprese", "all"),
        Variant("cats", "CATS", "cats"),
        Variant("caprese-cats", "Caprese (CATS)", "cats", "caprese"),
    )
}


@dataclass(frozen=True)
class Subject:
    """The model: a directory, its dimensions, and the user's adapters, whose settings go before the others."""

    path: str  # directory, or Hub id
    name: str
    config: Any  # of transformers
    weights: Weights
    dummy: bool
    density: float
    rank: int
    dtype: str
    adapters: Mapping[MethodName, tuple[Path, AdapterConfig]] = field(default_factory=dict)

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def layers(self, variant: Variant) -> tuple[int, ...]:
        if variant.method is None:
            return ()
        if variant.layers is None and variant.method in self.adapters:
            return tuple(self.adapters[variant.method][1].layers)
        choice = DEFAULT_LAYERS[variant.method] if variant.layers is None else variant.layers
        return resolve_layers(choice, self.weights.layers)

    def density_of(self, method: MethodName) -> float:
        return self.adapters[method][1].density if method in self.adapters else self.density

    def method_rank(self, method: MethodName) -> int:
        """Of the adapter that serves this method."""
        return self.adapters[method][1].rank if method in self.adapters else self.rank

    def rank_of(self, variant: Variant) -> int:
        """Of L and R; 0 without."""
        return self.method_rank(variant.method) if variant.method and variant.correction == "caprese" else 0

    def added(self, variant: Variant) -> int:
        """Values of a sparse layer's correction."""
        if variant.correction == "lora":
            from ..lora.training import lora_rank

            info = BaseModelInfo.from_hf(self.config, self.name)
            return 3 * lora_rank(info, self.method_rank("griffin")) * (info.hidden_size + info.intermediate_size)
        return 2 * self.weights.hidden_size * self.rank_of(variant)


def subject_of(
    arch: str, model: str | None, adapters: Sequence[str], density: float, rank: int, dtype: str, folder: Path
) -> Subject:
    """The published shape `arch` with dummy weights, or the checkpoint `model` with its adapters; CapreseError for an
    unknown one."""
    from transformers import AutoConfig

    from caprese_distill.loading import load_small_parts

    if model is not None:
        config = load_small_parts(model)[0]
        paths = [Path(find_adapter(path)) for path in adapters]
        given = {made.method: (path, made) for path in paths for made in [read_config(path)]}
        return Subject(model, Path(model).name, config, Weights.of(config), False, density, rank, dtype, given)
    if adapters:
        raise CapreseError("--weights", expected="--model, which it is for", found="dummy weights", fix="give --model")
    path = str(write_arch(arch, folder))
    config = AutoConfig.from_pretrained(path)
    return Subject(path, arch, config, Weights.of(config), True, density, rank, dtype)


def adapter_for(subject: Subject, variant: Variant, folder: Path) -> Path:
    """The adapter that a Caprese variant is served with: the user's, or one of random L, R of the right shape."""
    import torch

    from caprese_kernels.adapters import Adapters

    assert variant.method is not None
    if not subject.dummy:
        if variant.method not in subject.adapters:
            raise CapreseError(
                f"variant {variant.id}",
                expected=f"an adapter for {variant.method}, given by --weights",
                found="none",
                fix="give one, or choose other --variants",
            )
        path, config = subject.adapters[variant.method]
        if tuple(config.layers) != subject.layers(variant):
            raise CapreseError(
                f"variant {variant.id}",
                expected=f"an adapter for layers {list(subject.layers(variant))}",
                found=f"{path.name}, for layers {config.layers}",
                fix="choose other --variants",
            )
        return path
    path = folder / f"{variant.id}.safetensors"
    if not path.exists():
        layers, depth = subject.layers(variant), subject.weights.hidden_size
        generator = torch.Generator().manual_seed(0)
        left, right = (
            {i: (torch.randn(shape, generator=generator) * 1e-3).bfloat16() for i in layers}
            for shape in ((depth, subject.rank), (subject.rank, depth))
        )
        info = BaseModelInfo.from_hf(subject.config, subject.name)
        made = AdapterConfig(
            base_model=info, method=variant.method, density=subject.density, rank=subject.rank, layers=list(layers)
        )
        Adapters(made, left, right).save(path)
    return path


def job_of(subject: Subject, variant: Variant, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `engine_process` is told of the variant."""
    job: dict[str, Any] = {"model": subject.path, "engine": options, "caprese": None}
    if variant.correction == "caprese":
        job["caprese"] = {"weights": str(adapter_for(subject, variant, folder))}
    elif variant.method:
        layers = list(subject.layers(variant))
        job["caprese"] = {"method": variant.method, "density": subject.density_of(variant.method), "layers": layers}
    if variant.correction == "lora":
        job["caprese"]["kernel_extension"] = LORA
        job["variables"] = lora_environment(folder, subject.method_rank("griffin"))
    return job


def groups(variants: Sequence[Variant], together: int) -> list[list[Variant]]:
    """Who runs at the same time: Full in every group, as the measure of its ratios, and `together` engines at most."""
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


def room(subject: Subject, device: str, kv_gib: float) -> int:
    """How many engines fit into the memory that is free."""
    overhead = 4.0 if device == "cuda" else 2.0  # GiB: graphs, workspace and CUDA's own; Python, vLLM and compiled code
    each = subject.weights.total * subject.itemsize / GIB + kv_gib + overhead
    return int(free_gib(device) / each)


def free_gib(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] / GIB
    import psutil

    return psutil.virtual_memory().available / GIB


@contextmanager
def running(
    jobs: dict[str, dict[str, Any]], device: str, kv: float, logs: Path, console: Console
) -> Iterator[dict[str, Engine]]:
    """An engine for each job, started side by side: two at a time on a CPU, whose cores their compiling needs.

    On a CPU an engine runs in the process that asks it, which leaves both cores to the model; on a GPU vLLM's default
    is the faster one.
    """
    cpu = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(kv))}
    side_by_side, environment = (len(jobs), {}) if device == "cuda" else (2, cpu)
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        names = list(jobs)
        for begin in range(0, len(names), side_by_side):
            part = names[begin : begin + side_by_side]
            with console.status(f"starting engines: {', '.join(part)}"):
                for name in part:
                    job = dict(jobs[name])
                    more = environment | job.pop("variables", {})
                    engine = Engine(logs / f"latency-{name}.log", more, **job)
                    engines[name] = stack.enter_context(engine)
                for name in part:
                    engines[name].ready()
        yield engines
    for name in jobs:
        (logs / f"latency-{name}.log").unlink()


def engine_options(
    subject: Subject, device: str, max_len: int, max_seqs: int, kv: float, share: float, eager: bool
) -> dict[str, Any]:
    """vLLM's own settings but for sizes: compiled, and with CUDA graphs on a GPU, unless `eager`.

    `kv` GiB of KV cache; `share` of a GPU's memory, which must be free at the start.
    """
    options: dict[str, Any] = {
        "seed": 0,
        "dtype": subject.dtype,
        "skip_tokenizer_init": True,
        "max_model_len": max_len,
        "max_num_seqs": max_seqs,
        "enforce_eager": eager,
    }
    if subject.dummy:
        options["load_format"] = "dummy"
    if device == "cuda":
        options |= {"kv_cache_memory_bytes": int(kv * GIB), "gpu_memory_utilization": share}
    return options


def kv_gib(subject: Subject, tokens: int) -> float:
    """Of the KV cache that `tokens` tokens need, with a tenth to spare; a GiB at least."""
    return max(1.0, 1.1 * subject.weights.kv * subject.itemsize * tokens / GIB)


def prompts(subject: Subject, data: str | None, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` different prompts of `length` tokens: of the rows of `data`, drawn by the seed, or random ones."""
    if data is None:
        rng, vocabulary = random.Random(seed), subject.config.vocab_size
        return [[rng.randrange(10, vocabulary) for _ in range(length)] for _ in range(count)]
    tokenizer, rows = _source(subject.path, data)
    rows = random.Random(seed).sample(rows, len(rows))
    made: list[list[int]] = [[]]
    for row in rows * (1 + count * length // max(len(rows), 1)):
        text = row.prompt if isinstance(row.prompt, str) else "\n".join(str(m["content"]) for m in row.prompt)
        made[-1] += tokenizer(f"{text}\n")["input_ids"]
        if len(made[-1]) >= length:
            made[-1] = made[-1][:length]
            if len(made) == count:
                return made
            made.append([])
    raise CapreseError(f"--data {data}", expected="some text", found="none", fix="give other data")


@cache
def _source(model: str, data: str) -> tuple[Any, list[Any]]:
    from caprese_distill.data.sources import read_source
    from caprese_distill.loading import load_small_parts

    return load_small_parts(model)[1], read_source(data, responses=False).rows
