"""Architectures beyond those of test_equality.py: tokens and log-probabilities equal the reference's, for each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import engine, greedy
from tests.support.equality import BUDGET, MORE_CASES, NEW_TOKENS, Case, check
from tests.support.hf_reference import Generation
from tests.support.models import make_adapter, random_prompts

LENGTHS = (1, 7, 33, BUDGET + 1)


@pytest.mark.parametrize(("name", "method"), MORE_CASES)
def test_tokens_equal_the_reference(model_dir: Callable[[str], Path], tmp_path: Path, name: str, method: str) -> None:
    """With an adapter: mixed lengths in a batch, the last prompt in two chunks; and the same requests switched off.

    Random weights make some of these models repeat themselves, so log-probabilities are compared too.
    """
    # Half of what a ReLU gives is zero: at density 0.5 the threshold would be zero, and nothing sparse.
    density = 0.3 if name.startswith("opt") else 0.5
    adapter = make_adapter(model_dir(name), tmp_path / "adapter.safetensors", method, density=density)
    case = Case(model_dir(name), method, adapter, density)
    prompts = random_prompts(LENGTHS)
    expected, dense = case.expected(prompts), case.expected(prompts, method=None)
    plain = [case.one(prompt, left={}, right={}) for prompt in prompts]
    whole = [case.one(prompt, method="griffin", density=1.0, left={}, right={}) for prompt in prompts]
    assert not far(expected, expected)
    assert far(expected, dense) >= len(prompts) // 2, "sparsity must show, or equality proves nothing"
    assert far(expected, plain) >= len(prompts) // 2, "the adapter must show, or equality proves nothing"
    assert not far(whole, dense), "the reference's FF block is not the model's"
    with engine(case.model_dir, case.caprese, max_num_batched_tokens=BUDGET) as llm:
        for what, reference, switch in (("sparse", expected, None), ("off", dense, "off")):
            found = generate(llm, prompts, switch)
            check([result.tokens for result in found], reference, f"{name}, {method}, {what}")
            assert not far(found, reference), f"{name}, {method}, {what}"


def far(some: Sequence[Generation], others: Sequence[Generation]) -> int:
    """How many pairs differ in a token, or in a token's log-probability.

    Logits of about 10 in float32, summed in another order through 4 layers, differ by 1e-5: 1e-3 is far beyond. Where
    a neuron's |g| is within rounding of tau, it may fall on either side: one of 160, at the border.
    """
    count = 0
    for a, b in zip(some, others, strict=True):
        slack = 1e-3 if min(a.closest, b.closest) > 1e-5 else 1e-2
        count += a.tokens != b.tokens or a.logprobs != pytest.approx(b.logprobs, abs=slack)
    return count


def generate(llm: Any, prompts: Sequence[Sequence[int]], caprese: str | None) -> list[Generation]:
    params = greedy(NEW_TOKENS, caprese)
    params.logprobs = 0  # of the token chosen
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    results = [output.outputs[0] for output in outputs]
    return [
        Generation(
            list(result.token_ids),
            logprobs=[step[token].logprob for step, token in zip(result.logprobs, result.token_ids, strict=True)],
        )
        for result in results
    ]
