"""The model that `caprese bench latency` serves: a published shape with dummy weights, or a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from caprese_kernels.adapters import find_adapter, read_config
from caprese_kernels.config import AdapterConfig, BaseModelInfo, Method, MethodName, method_of
from caprese_kernels.errors import CapreseError

from ..kernels.floor import Weights
from ..results.configured import check_new, parse_config
from .models import write_arch
from .variants import PRIOR, VARIANTS, Variant


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

    def method_of(self, variant: Variant) -> Method | None:
        """What the variant's engine must report; None for Full.

        A user's adapter decides on density and layers of its method; where L and R correct it, on rank and selection.
        """
        if variant.configured is not None:
            return variant.configured.method
        if variant.method is None:
            return None
        layers = tuple(variant.sparse_layers(self.weights.layers))
        rank = self.rank if variant.correction == "caprese" else 0
        if variant.core is not None:
            return Method(variant.method, self.density, layers, rank, "weighted", PRIOR, variant.core)
        if variant.method not in self.adapters:
            return Method(variant.method, self.density, layers, rank)
        own = self.adapters[variant.method][1]
        if variant.layers is None:
            layers = tuple(own.layers)
        if variant.correction != "caprese":
            return Method(variant.method, own.density, layers, 0)
        return method_of(own).restricted(layers)

    def layers(self, variant: Variant) -> tuple[int, ...]:
        """The variant's sparse layers."""
        method = self.method_of(variant)
        return () if method is None else method.layers

    @property
    def lora_as(self) -> int:
        """The rank of L and R that have as many parameters as the LoRA."""
        return self.adapters["griffin"][1].rank if "griffin" in self.adapters else self.rank

    def added(self, variant: Variant) -> int:
        """Values of a sparse layer's correction: 2 D r of L and R, or 3 r' (D + F) of LoRA."""
        if variant.correction == "lora":
            from ..lora.training import lora_rank

            info = BaseModelInfo.from_hf(self.config, self.name)
            return 3 * lora_rank(info, self.lora_as) * (info.hidden_size + info.intermediate_size)
        method = self.method_of(variant)
        return 0 if method is None else 2 * self.weights.hidden_size * method.rank


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


def configured_variants(model: TimedModel, texts: Sequence[str]) -> list[Variant]:
    """A variant for each NAME=JSON of --config. Raises CapreseError for text that is not one."""
    info, found = BaseModelInfo.from_hf(model.config, model.name), list[Variant]()
    for text in texts:
        given = parse_config(text, info)
        check_new(given.name, [*VARIANTS, *(variant.id for variant in found)])
        found.append(Variant(given.name, given.name, given.method.name, configured=given))
    return found


def adapter_for(model: TimedModel, variant: Variant, folder: Path) -> Path:
    """The adapter for a variant with L and R or a core: the user's, or a random one of the right shape in `folder`.

    Time does not depend on its values. Raises CapreseError if a checkpoint has no adapter for the variant's method, or
    one for other layers.
    """
    assert variant.method is not None
    if model.dummy or variant.core is not None:
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

    method = model.method_of(variant)
    assert method is not None
    generator = torch.Generator().manual_seed(0)
    depth, info = model.weights.hidden_size, BaseModelInfo.from_hf(model.config, model.name)

    def random(*shape: int) -> dict[int, torch.Tensor]:
        return {i: (torch.randn(shape, generator=generator) * 1e-3).bfloat16() for i in method.layers}

    left, right = (random(depth, method.rank), random(method.rank, depth)) if method.rank else ({}, {})
    prior = {}
    if method.needs_prior:
        prior = {i: torch.rand(info.intermediate_size, generator=generator).softmax(dim=0) for i in method.layers}
    settings = {key: getattr(method, key) for key in ("density", "rank", "score", "prior", "core")}
    config = AdapterConfig(base_model=info, method=method.name, layers=list(method.layers), **settings)
    Adapters(config, left, right, prior).save(path)


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
