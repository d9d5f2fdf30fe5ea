"""LoRA requests: an adapter of the attention, or of FF blocks that run dense, beside requests without one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from caprese_kernels.errors import CapreseError
from tests.support.engine import DEFAULTS, engine, generate, greedy
from tests.support.equality import BUDGET, LENGTHS, NEW_TOKENS, Case, check, differing, new_case
from tests.support.lora import ATTENTION, make_lora, merged
from tests.support.models import random_prompts
from tests.support.v2_process import run_v2

FF = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ModelDir = Callable[[str], Path]


@pytest.mark.parametrize(
    ("architecture", "method", "v2", "core"),
    [
        ("llama", "griffin", False, None),
        ("qwen3", "cats", False, None),
        ("mistral", "griffin", True, None),
        ("llama", "griffin", False, 0.8),
        ("qwen3", "griffin", False, 1.0),
    ],
)
def test_lora_requests(
    model_dir: ModelDir, tmp_path: Path, architecture: str, method: str, v2: bool, core: float | None
) -> None:
    """In one batch: two adapters and none. Each request's tokens are those of its own merged model."""
    case = new_case(model_dir, tmp_path, architecture, method, True, core)
    prompts, new_tokens = random_prompts(LENGTHS[1:5] if v2 else LENGTHS), 8 if v2 else NEW_TOKENS
    cases: list[Case] = [case]
    loras: list[Path | None] = [None]
    for i in (1, 2):
        lora = make_lora(case.model_dir, tmp_path / f"lora{i}", seed=i)
        cases.append(replace(case, model_dir=merged(case.model_dir, lora, tmp_path / f"merged{i}")))
        loras.append(lora)
    expected = [each.expected(prompts, new_tokens) for each in cases]
    assert differing(expected[1], expected[0]) > len(prompts) // 2, "the LoRA adapter must show"
    dense = [cases[1].one(prompt, new_tokens, method=None) for prompt in prompts]
    assert differing(expected[1], dense) >= len(prompts) // 2, "sparsity must show"
    # One place stays free: vLLM 0.32's CPU kernels index with -1, the last place, for requests without an adapter.
    options = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8, "max_num_batched_tokens": BUDGET}
    batch = [(prompt, which) for prompt in range(len(prompts)) for which in range(3)]
    requests, chosen = [prompts[prompt] for prompt, _ in batch], [loras[which] for _, which in batch]
    if v2:
        job = {"model": str(case.model_dir), "caprese": case.caprese, "engine": DEFAULTS | options}
        paths = [path and str(path) for path in chosen]
        found = run_v2(job | {"prompts": requests, "new_tokens": new_tokens, "loras": paths})["tokens"]
    else:
        with engine(case.model_dir, case.caprese, **options) as llm:
            found = generate(llm, requests, greedy(new_tokens), chosen)
    check(found, [expected[which][prompt] for prompt, which in batch], f"{architecture}, {method}, core {core}, LoRA")


def test_lora_of_ff_blocks(model_dir: ModelDir, tmp_path: Path) -> None:
    """Served where the block runs dense; refused, by the module's name, where it runs sparse."""
    case = new_case(model_dir, tmp_path, "qwen2", "griffin", True)  # layers 0 and 1 of 4
    behind = make_lora(case.model_dir, tmp_path / "lora1", (*ATTENTION, *FF), layers=(2, 3))
    inside = make_lora(case.model_dir, tmp_path / "inside", FF, layers=(1, 2))
    prompts = random_prompts(LENGTHS[:4])
    expected = Case(merged(case.model_dir, behind, tmp_path / "merged"), "griffin", case.adapter).expected(prompts)
    assert differing(expected, case.expected(prompts)) == len(prompts)
    with engine(case.model_dir, case.caprese, enable_lora=True, max_lora_rank=8) as llm:
        found = generate(llm, prompts, greedy(NEW_TOKENS), [behind] * len(prompts))
        check(found, expected, "LoRA of dense FF blocks")
        with pytest.raises(CapreseError, match=r"adapter inside.*layers\.1\.mlp\.down_proj"):
            llm.llm_engine.add_lora(LoRARequest("inside", 2, str(inside)))
