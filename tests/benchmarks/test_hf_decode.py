"""Batched decoding without an engine: the same tokens as the engine's, and as one request alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from caprese_bench.hugging_face.decoding import (
    FeedForward,
    SparseFF,
    activations,
    adapter_blocks,
    decode,
    prompt_ids,
    score,
)
from caprese_kernels.adapters import Adapters
from caprese_kernels.config import Method, method_of
from caprese_serve.demo import ADAPTERS, MODEL
from caprese_serve.demo.problems import Problem, problems
from tests.support import environment  # noqa: F401  the environment of engines in this process
from tests.support.hf_reference import HFReference
from tests.support.models import make_adapter

MAX_TOKENS = 64


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def asked() -> list[Problem]:
    return [*problems("math", "test", 25), *problems("reading", "test", 15)]


def blocks_of(name: str) -> tuple[Adapters, dict[int, FeedForward]]:
    """The demo's adapter of a method, in float32."""
    adapters = Adapters.load(ADAPTERS[name])
    return adapters, adapter_blocks(adapters, dtype=torch.float32)


@pytest.mark.parametrize("name", ["griffin", "cats"])
def test_answers_are_the_engines(model: Any, tokenizer: Any, asked: list[Problem], name: str) -> None:
    from vllm import SamplingParams

    from tests.support.engine import engine

    requests: Any = [{"prompt_token_ids": prompt_ids(tokenizer, problem)} for problem in asked]
    with engine(MODEL, {"weights": str(ADAPTERS[name])}, max_num_seqs=16) as llm:
        outputs = llm.generate(requests, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), use_tqdm=False)
    expected = [[t for t in output.outputs[0].token_ids if t != tokenizer.eos_token_id] for output in outputs]
    assert decode(model, tokenizer, asked, blocks_of(name)[1], MAX_TOKENS) == expected


@pytest.mark.parametrize(
    ("name", "selection"),
    [
        ("griffin", {"score": "weighted", "prior": 0.5, "core": 0.8}),
        ("griffin", {"score": "weighted", "prior": 0.5, "core": 1.0}),
        ("griffin", {"score": "paper", "prior": 0.5, "core": 0.0}),
        ("cats", {"score": "weighted", "prior": 0.0, "core": 0.0}),
    ],
)
def test_answers_by_score_prior_and_core_are_the_engines(
    model: Any, tokenizer: Any, asked: list[Problem], name: str, selection: dict[str, Any], tmp_path: Path
) -> None:
    from vllm import SamplingParams

    from tests.support.engine import engine

    density = 0.1 if name == "cats" else 0.5  # CATS hardly changes the demo's answers above
    path = make_adapter(MODEL, tmp_path / "a.safetensors", name, density=density, rank=0, selection=selection)
    requests: Any = [{"prompt_token_ids": prompt_ids(tokenizer, problem)} for problem in asked]
    with engine(MODEL, {"weights": str(path)}, max_num_seqs=16) as llm:
        outputs = llm.generate(requests, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)
    expected = [[t for t in output.outputs[0].token_ids if t != tokenizer.eos_token_id] for output in outputs]
    adapters = Adapters.load(path)
    found = decode(model, tokenizer, asked, adapter_blocks(adapters), 24)
    assert found == expected
    paper = replace(method_of(adapters.config), score="paper", prior=0.0, core=0.0)
    assert decode(model, tokenizer, asked, adapter_blocks(adapters, paper), 24) != found


@pytest.mark.parametrize("name", ["griffin", "cats"])
def test_a_request_stands_alone(model: Any, tokenizer: Any, asked: list[Problem], name: str) -> None:
    """Many of one length, some ending before others: each as the reference makes it alone."""
    adapters, ff = blocks_of(name)
    length = len(prompt_ids(tokenizer, asked[0]))
    drawn = [p for p in problems("math", "test", 300) if len(prompt_ids(tokenizer, p)) == length][:6]
    made = decode(model, tokenizer, drawn, ff, MAX_TOKENS)
    assert len({len(answer) for answer in made}) > 1
    config, reference = adapters.config, HFReference(MODEL)
    for problem, answer in zip(drawn, made, strict=True):
        alone = reference.generate(
            prompt_ids(tokenizer, problem),
            MAX_TOKENS,
            eos=tokenizer.eos_token_id,
            method=config.method,
            density=config.density,
            layers=config.layers,
            left={i: t.float() for i, t in adapters.left.items()},
            right={i: t.float() for i, t in adapters.right.items()},
        )
        assert [t for t in alone.tokens if t != tokenizer.eos_token_id] == answer


def test_the_original_model_and_the_limit(model: Any, tokenizer: Any, asked: list[Problem]) -> None:
    before = model.get_decoder().layers[0].mlp.forward
    advanced: list[int] = []
    answers = decode(model, tokenizer, asked, advance=advanced.append)
    assert sum(advanced) == len(asked)
    assert score(tokenizer, asked, answers).accuracy > 0.9
    assert decode(model, tokenizer, asked, max_tokens=5) == [answer[:5] for answer in answers]
    # Density 1 drops nothing.
    everything = {i: SparseFF(Method("cats", 1.0, (0, 1, 2, 3), 0)) for i in range(4)}
    assert decode(model, tokenizer, asked, everything) == answers
    assert model.get_decoder().layers[0].mlp.forward == before


def test_other_blocks_may_take_part(model: Any, tokenizer: Any, asked: list[Problem]) -> None:
    """A block of one's own sees whole prompts, then one token a request, and its requests leave as they end."""

    class Counting(SparseFF):
        live: list[int]

        def prompt(self, block: Any, x: torch.Tensor) -> torch.Tensor:
            self.live = [len(x)]
            return super().prompt(block, x)

        def token(self, block: Any, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[1:] == (1, 128)
            assert len(x) == len(self.selection) == self.live[-1]
            return block.down_proj(activations(block, x)[1])

        def keep_requests(self, rows: torch.Tensor) -> None:
            super().keep_requests(rows)
            self.live.append(len(rows))

    block = Counting(Method("griffin", 0.1, (2,), 0))
    assert decode(model, tokenizer, asked, {2: block}) == decode(model, tokenizer, asked)
    assert block.live[-1] == 0
