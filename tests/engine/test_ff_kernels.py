"""An engine with FF kernels that another package registered (caprese_vllm.ff_kernels)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from caprese_kernels.backend import Backend
from caprese_kernels.config import Method
from caprese_kernels.packed import PackedFF
from caprese_vllm import ff_kernels
from tests.support.engine import engine, generate, greedy
from tests.support.models import random_prompts


class Doubled:
    """The kernels below, with twice their output for generated tokens."""

    def __init__(self, below: Backend, method: Method, blocks: Mapping[int, PackedFF]):
        self.below, self.method, self.blocks = below, method, dict(blocks)
        self.NAME = f"doubled over {below.NAME}"
        self.calls: list[tuple[int, int]] = []  # layer, tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)

    def griffin_ff(self, x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor, **more: Any) -> Tensor:
        (layer,) = (layer for layer, packed in self.blocks.items() if packed is ff)
        self.calls.append((layer, len(x)))
        return self.below.griffin_ff(x, ff, keep, slots, **more).mul_(2)


def test_the_engine_runs_them(model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """They see each sparse layer's weights, compute every generated token, and change the answers."""
    made: list[Doubled] = []

    def factory(backend: Backend, method: Method, blocks: Mapping[int, PackedFF]) -> Any:
        made.append(Doubled(backend, method, blocks))
        return made[-1]

    monkeypatch.setattr(ff_kernels, "_extensions", {})
    ff_kernels.register("doubled", factory)
    plain = {"method": "griffin", "kernel": "reference"}
    prompts, new_tokens = random_prompts((9, 5), seed=3), 6
    with engine(model_dir("llama"), plain) as llm:
        expected = generate(llm, prompts, greedy(new_tokens))
    with engine(model_dir("llama"), plain | {"kernel_extension": "doubled"}) as llm:
        found = generate(llm, prompts, greedy(new_tokens))
        assert llm.collective_rpc("caprese_report")[0]["kernel"] == "doubled over reference"
    (kernels,) = made
    assert kernels.method == Method("griffin", 0.5, (0, 1), 0)
    assert sorted(kernels.blocks) == [0, 1]
    assert sum(tokens for layer, tokens in kernels.calls if layer == 1) == len(prompts) * (new_tokens - 1)
    assert [ids[0] for ids in found] == [ids[0] for ids in expected], "the prompt's own pass makes the first token"
    assert found != expected
    assert all(torch.equal(kernels.blocks[i].up_plus, kernels.blocks[i].gate_up_plus[-97:]) for i in (0, 1))
