"""The model that `caprese bench latency` serves: a published shape with dummy weights, or a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from caprese_kernels.adapters import find_adapter, read_config
from caprese_kernels.config import AdapterConfig, BaseModelInfo, MethodName
from caprese_kernels.errors import CapreseError

from ..kernels.floor import Weights
from .models import write_arch
from .variants import Variant


@dataclass(frozen=True)
class TimedModel:
    """A model, its dimensions, and the user's adapters, whose settings take precedence over `density` and `rank`."""

    path: str  # directory or Hub id
    name: str
    config: Any  # of transformers
    weights: Weights
    dummy: bool  # random weights of a published shape
    density: float
    rank: int
    dtype: str
    adapters: Mapping[MethodName, tuple[Path, AdapterConfig]] = field(default_factory=dict)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 4 if self.dtype == "float32" else 2

    def layers(self, variant: Variant) -> tuple[int, ...]:
        """The variant's sparse layers: its adapter's, or those of its method."""
        if variant.method is not None and variant.layers is None and variant.method in self.adapters:
            return tuple(self.adapters[variant.method][1].layers)
        return tuple(variant.sparse_layers(self.weights.layers))

    def density_of(self, method: MethodName) -> float:
        """Share of neurons that the method keeps."""
        return self.adapters[method][1].density if method in self.adapters else self.density

    def method_rank(self, method: MethodName) -> int:
        """Rank of the adapter for this method."""
        return self.adapters[method][1].rank if method in self.adapters else self.rank

    def rank_of(self, variant: Variant) -> int:
        """Rank of the variant's L and R; 0 without."""
        return self.method_rank(variant.method) if variant.method and variant.correction == "caprese" else 0

    def added(self, variant: Variant) -> int:
        """Values of a sparse layer's correction: 2 D r of L and R, or 3 r' (D + F) of LoRA."""
        if variant.correction == "lora":
            from ..lora.training import lora_rank

            info = BaseModelInfo.from_hf(self.config, self.name)
            return 3 * lora_rank(info, self.method_rank("griffin")) * (info.hidden_size + info.intermediate_size)
        return 2 * self.weights.hidden_size * self.rank_of(variant)


def load_timed_model(
    arch: str, model: str | None, adapters: Sequence[str], density: float, rank: int, dtype: str, folder: Path
) -> TimedModel:
    """The checkpoint `model` with its adapters, or without one the published shape `arch`, written to `folder`.

    Raises CapreseError for an unknown shape, model or adapter, and for adapters without a model.
    """
    from transformers import AutoConfig

    from caprese_distill.loading import load_small_parts

    if model is not None:
        config = load_small_parts(model)[0]
        paths = [Path(find_adapter(path)) for path in adapters]
        by_method = {found.method: (path, found) for path in paths for found in [read_config(path)]}
        return TimedModel(model, Path(model).name, config, Weights.of(config), False, density, rank, dtype, by_method)
    if adapters:
        raise CapreseError(
            "--weights", expected="--model, the model that they are for", found="dummy weights", fix="give --model"
        )
    path = str(write_arch(arch, folder))
    config = AutoConfig.from_pretrained(path)
    return TimedModel(path, arch, config, Weights.of(config), True, density, rank, dtype)


def adapter_for(model: TimedModel, variant: Variant, folder: Path) -> Path:
    """The adapter for a Caprese variant: the user's, or random L and R of the right shape, written to `folder`.

    Raises CapreseError if a checkpoint has no adapter for the variant's method, or one for other layers.
    """
    assert variant.method is not None
    if model.dummy:
        path = folder / f"{variant.id}.safetensors"
        if not path.exists():
            _write_random_adapter(model, variant, path)
        return path
    if variant.method not in model.adapters:
        raise CapreseError(
            f"variant {variant.id}",
            expected=f"an adapter for {variant.method}, given by --weights",
            found="none",
            fix="give one, or choose other --variants",
        )
    path, config = model.adapters[variant.method]
    if tuple(config.layers) != model.layers(variant):
        raise CapreseError(
            f"variant {variant.id}",
            expected=f"an adapter for layers {list(model.layers(variant))}",
            found=f"{path.name}, for layers {config.layers}",
            fix="choose other --variants",
        )
    return path


def _write_random_adapter(model: TimedModel, variant: Variant, path: Path) -> None:
    import torch

    from caprese_kernels.adapters import Adapters

    assert variant.method is not None
    layers, depth = model.layers(variant), model.weights.hidden_size
    generator = torch.Generator().manual_seed(0)
    left, right = (
        {i: (torch.randn(shape, generator=generator) * 1e-3).bfloat16() for i in layers}
        for shape in ((depth, model.rank), (model.rank, depth))
    )
    info = BaseModelInfo.from_hf(model.config, model.name)
    config = AdapterConfig(
        base_model=info, method=variant.method, density=model.density, rank=model.rank, layers=list(layers)
    )
    Adapters(config, left, right).save(path)


def prompts(model: TimedModel, data: str | None, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` different prompts of `length` tokens: from the rows of `data` in random order, or random tokens."""
    if data is None:
        rng, vocabulary = random.Random(seed), model.config.vocab_size
        return [[rng.randrange(10, vocabulary) for _ in range(length)] for _ in range(count)]
    from caprese_distill.data.messages import plain_text

    tokenizer, rows = _source(model.path, data)
    rows = random.Random(seed).sample(rows, len(rows))
    drawn: list[list[int]] = [[]]
    for row in rows * (1 + count * length // max(len(rows), 1)):
        text = row.prompt if isinstance(row.prompt, str) else "\n".join(plain_text(m["content"]) for m in row.prompt)
        drawn[-1] += tokenizer(f"{text}\n")["input_ids"]
        if len(drawn[-1]) >= length:
            drawn[-1] = drawn[-1][:length]
            if len(drawn) == count:
                return drawn
            drawn.append([])
    raise CapreseError(f"--data {data}", expected="some text", found="none", fix="give other data")


@cache
def _source(model: str, data: str) -> tuple[Any, list[Any]]:
    """The model's tokenizer and the rows of `data`."""
    from caprese_distill.data.sources import read_source
    from caprese_distill.loading import load_small_parts

    return load_small_parts(model)[1], read_source(data, responses=False).rows
