"""n-gram speculation: drafts are generated tokens and run sparse; accepted or rejected, the tokens are the same."""

from pathlib import Path

import pytest

from tests.support.engine import DEFAULTS
from tests.support.equality import check, differing, new_case
from tests.support.models import make_model, random_prompts
from tests.support.v2_process import run_v2

SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
NEW_TOKENS = 40


@pytest.mark.parametrize(
    ("runner", "architecture", "method", "core"),
    [
        ("--v1", "llama", "griffin", None),
        ("--v1", "qwen3", "cats", None),
        ("", "llama", "cats", None),
        ("--v1", "llama", "griffin", 1.0),
        ("", "llama", "griffin", 0.8),
    ],
)
def test_ngram_speculation(tmp_path: Path, runner: str, architecture: str, method: str, core: float | None) -> None:
    """A vocabulary of a dozen tokens: what follows a token has often been seen before, and is often something else.

    In chunks, and with so few blocks that requests are preempted between drafts.
    """
    directory = make_model(architecture, tmp_path / "model", vocab_size=12)
    case = new_case(lambda _: directory, tmp_path, architecture, method, True, core)
    prompts = [[token % 12 for token in prompt] for prompt in random_prompts((1, 9, 20, 33, 40), seed=31)]
    expected = case.expected(prompts, NEW_TOKENS)
    assert differing(expected, case.expected(prompts, NEW_TOKENS, method=None)) == len(prompts)
    options = {"max_num_batched_tokens": 32, "num_gpu_blocks_override": 8, "max_model_len": 96}
    job = {
        "model": str(directory),
        "caprese": case.caprese,
        "engine": DEFAULTS | options | {"speculative_config": SPECULATION, "disable_log_stats": False},
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
    }
    # A process for V1 too: numba, which proposes the drafts, keeps vLLM's CPU platform from starting another engine.
    found = run_v2(job, *runner.split())
    assert found["v2"] == (not runner)
    check(found["tokens"], expected, f"speculation, {architecture}, {method}, core {core}, {runner or 'V2'}")
    assert found["preempted"] > 0
    drafted = found["counters"]["vllm:spec_decode_num_draft_tokens"]
    accepted = found["counters"]["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < drafted
