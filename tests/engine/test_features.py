"""What a request may ask of vLLM besides greedy tokens, and engine options that change when or from what it runs.

The check is the reference's: the same tokens under the same rule for its logits, or the same probabilities.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.support.engine import engine, generate, greedy, scheduler
from tests.support.equality import NEW_TOKENS, Case, check, differing, new_case
from tests.support.models import EOS, VOCABULARY, make_model, make_tokenizer, random_prompts

ModelDir = Callable[[str], Path]
Process = Callable[[list[int], Tensor], Tensor]
ONE_FORM = {"backend": "xgrammar", "disable_any_whitespace": True}  # of JSON, or a random model writes spaces for ever
PROMPTS = random_prompts((1, 7, 33, 60), seed=41)


def asking(**options: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True} | options))


@pytest.fixture(scope="module")
def case(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return new_case(model_dir, tmp_path_factory.mktemp("adapter"), "llama", "griffin", True)


@pytest.fixture(scope="module")
def llm(case: Case) -> Iterator[LLM]:
    with engine(case.model_dir, case.caprese, structured_outputs_config=ONE_FORM) as llm:
        yield llm


def check_processed(llm: LLM, case: Case, params: SamplingParams, process: Callable[[list[int]], Process]) -> None:
    """`process(prompt)` is the same rule for the reference. Beside other requests, which go their own way."""
    expected = [case.one(prompt, process=process(prompt)) for prompt in PROMPTS]
    assert min(min(each.margins) for each in expected) > 1e-4, "two logits tie in the reference: choose other prompts"
    plain = case.expected(PROMPTS)
    assert differing(expected, plain), "the rule must show"
    assert differing(expected, [case.one(prompt, method=None, process=process(prompt)) for prompt in PROMPTS])
    both = [each for prompt in PROMPTS for each in (prompt, prompt)]
    found = generate(llm, both, [params, greedy(NEW_TOKENS)] * len(PROMPTS))
    check(found[0::2], expected, str(params))
    check(found[1::2], plain, "neighbours")


class TestRulesForLogits:
    def test_penalties(self, llm: LLM, case: Case) -> None:
        params = asking(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7)

        def process(prompt: list[int]) -> Process:
            def penalize(generated: list[int], logits: Tensor) -> Tensor:
                seen = sorted({*prompt, *generated})
                logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
                counts = torch.bincount(torch.tensor(generated, dtype=torch.int64), minlength=VOCABULARY)
                return logits - 0.7 * counts - 0.4 * (counts > 0)

            return penalize

        check_processed(llm, case, params, process)

    def test_bias_and_forbidden_tokens(self, llm: LLM, case: Case) -> None:
        plain = [each.tokens for each in case.expected(PROMPTS)]
        bias = dict.fromkeys((plain[0][0], plain[1][0]), -100.0) | {200: 2.0, 201: 1.0}
        word = next(text_of([t]) for t in plain[2] if text_of([t]).isascii() and text_of([t]).isprintable())
        tokenized = [make_tokenizer().encode(space + word, add_special_tokens=False) for space in ("", " ")]
        forbidden = [tokens[0] for tokens in tokenized if len(tokens) == 1]
        assert forbidden[0] in plain[2]

        def process(generated: list[int], logits: Tensor) -> Tensor:
            for token, more in bias.items():
                logits[token] += more
            logits[forbidden] = -1e9
            return logits

        check_processed(llm, case, asking(logit_bias=bias, bad_words=[word]), lambda prompt: process)

    def test_allowed_tokens_and_a_least_length(self, llm: LLM, case: Case) -> None:
        allowed, end = list(range(1, VOCABULARY, 3)), make_tokenizer().convert_tokens_to_ids(EOS)

        def process(generated: list[int], logits: Tensor) -> Tensor:
            kept = torch.full_like(logits, -1e9)
            kept[allowed] = logits[allowed]
            if len(generated) < NEW_TOKENS:
                kept[end] = -1e9
            return kept

        params = asking(allowed_token_ids=allowed, min_tokens=NEW_TOKENS, ignore_eos=False)
        check_processed(llm, case, params, lambda prompt: process)


def text_of(tokens: Sequence[int]) -> str:
    return make_tokenizer().decode(tokens)


def test_stopping(llm: LLM, case: Case) -> None:
    """At a token, at a string, at the model's own end: the reference's tokens up to there."""
    expected = case.expected(PROMPTS)
    params, length, reasons = [], [], []
    for i, each in enumerate(expected):
        tokens = each.tokens
        if i % 2:
            token = tokens[9]
            params.append(asking(stop_token_ids=[token]))
            length.append(tokens.index(token) + 1)
            reasons.append(token)
        else:
            string = re.findall(r"[!-~]{2}", text_of(tokens))[1]  # ASCII: other characters may be cut by a token's end
            params.append(asking(stop=[string]))
            length.append(next(n for n in range(1, NEW_TOKENS + 1) if string in text_of(tokens[:n])))
            reasons.append(string)
    assert all(n < NEW_TOKENS for n in length)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    for output, each, n, reason in zip(outputs, expected, length, reasons, strict=True):
        (sample,) = output.outputs
        assert list(sample.token_ids) == each.tokens[:n]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", reason)
        if isinstance(reason, str):
            assert sample.text == text_of(each.tokens[:n]).partition(reason)[0]
            assert sample.text
    assert not scheduler(llm).requests
    check(generate(llm, PROMPTS, greedy(NEW_TOKENS)), expected, "after requests that stopped early")


def test_the_models_end_of_sequence(llm: LLM, case: Case) -> None:
    end = make_tokenizer().convert_tokens_to_ids(EOS)
    bias: Process = lambda generated, logits: logits + 7.0 * (torch.arange(VOCABULARY) == end)  # noqa: E731
    expected = [case.one(prompt, eos=end, process=bias) for prompt in PROMPTS]
    assert any(len(each.tokens) < NEW_TOKENS for each in expected)
    found = generate(llm, PROMPTS, asking(ignore_eos=False, logit_bias={end: 7.0}))
    check(found, expected, "end of sequence")


def test_logprobs(llm: LLM, case: Case) -> None:
    """Of the prompt (the original model's), of what was generated (the sparse model's), and of the runners-up."""
    params = asking(logprobs=3, prompt_logprobs=2)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    for output, prompt, each in zip(outputs, PROMPTS, case.expected(PROMPTS), strict=True):
        (sample,) = output.outputs
        assert list(sample.token_ids) == each.tokens
        assert sample.logprobs is not None
        found = [step[token].logprob for step, token in zip(sample.logprobs, each.tokens, strict=True)]
        assert found == pytest.approx(each.logprobs, abs=1e-3)
        seconds = [next(p.logprob for p in step.values() if p.rank == 2) for step in sample.logprobs]
        leads = [a - b for a, b in zip(found, seconds, strict=True)]
        assert leads == pytest.approx(each.margins, abs=1e-3)
        assert output.prompt_logprobs is not None
        first, *rest = output.prompt_logprobs
        assert first is None
        of_prompt = [step[token].logprob for step, token in zip(rest, prompt[1:], strict=True) if step is not None]
        assert of_prompt == pytest.approx(each.prompt_logprobs, abs=1e-3)


def test_seeded_sampling(llm: LLM, case: Case) -> None:
    """A seeded request's tokens are its own, alone or beside others; each is one that min_p and top_k leave."""
    settings: dict[str, Any] = {"temperature": 1.5, "top_k": 20, "min_p": 0.05, "logprobs": 0}

    def sample(prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[tuple[int, ...]]:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [tuple(each.token_ids) for output in outputs for each in output.outputs]

    seeds = (7, 8, 9)
    params = [asking(seed=seed, **settings) for seed in seeds]
    alone = [sample([PROMPTS[2]], [each])[0] for each in params]
    assert len(set(alone)) == 3
    beside = sample([PROMPTS[2]] * 3 + PROMPTS, [*params, *[asking(temperature=1.0)] * len(PROMPTS)])
    assert beside[:3] == alone
    assert sample([PROMPTS[2]], [asking(seed=7, n=3, **settings)]) == alone, "sample i of n has seed + i"
    for tokens in alone:
        least: list[float] = []

        def watch(
            generated: list[int], logits: Tensor, tokens: Sequence[int] = tokens, least: list[float] = least
        ) -> Tensor:
            scaled = (logits / 1.5).softmax(dim=0)
            token = tokens[len(generated)]
            assert int((logits > logits[token]).sum()) < 20
            least.append(float(scaled[token] / scaled.max()))
            return logits

        case.one(PROMPTS[2], forced=tokens, process=watch)
        assert len(least) == NEW_TOKENS
        assert min(least) > 0.05 - 1e-4
    assert any(tokens != tuple(case.one(PROMPTS[2]).tokens) for tokens in alone)


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["one", "two", "three"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["kind", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("kind", "rule", "pattern"),
    [
        ("regex", "[a-f]{3}-[0-9]{4}", "[a-f]{3}-[0-9]{4}"),
        ("choice", ["three four", "three five", "ten"], "three four|three five|ten"),
        ("json", json.dumps(SCHEMA), r"(?s)\{.*\}"),
    ],
)
def test_structured_output(llm: LLM, case: Case, kind: str, rule: Any, pattern: str) -> None:
    """The reference is held to the same grammar by xgrammar, which vLLM uses too."""
    xgrammar = pytest.importorskip("xgrammar", reason="vLLM's backend of structured output")
    tokenizer, end = make_tokenizer(), make_tokenizer().convert_tokens_to_ids(EOS)
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=VOCABULARY))
    if kind == "json":
        grammar = compiler.compile_json_schema(rule, any_whitespace=False, separators=(",", ":"))
    elif kind == "regex":
        grammar = compiler.compile_regex(rule)
    else:
        grammar = compiler.compile_grammar("root ::= " + " | ".join(f'"{choice}"' for choice in rule))

    def process(prompt: list[int]) -> Process:
        matcher, mask = xgrammar.GrammarMatcher(grammar), xgrammar.allocate_token_bitmask(1, VOCABULARY)

        def keep_to_it(generated: list[int], logits: Tensor) -> Tensor:
            if generated:
                assert matcher.accept_token(generated[-1])
            matcher.fill_next_token_bitmask(mask)
            allowed = torch.tensor(
                [(int(mask[0, t // 32]) >> (t % 32)) & 1 for t in range(VOCABULARY)], dtype=torch.bool
            )
            return logits.masked_fill(~allowed, -1e9)

        return keep_to_it

    expected = [case.one(prompt, 40, eos=end, process=process(prompt)) for prompt in PROMPTS]
    assert differing(
        expected, [case.one(prompt, 40, eos=end, method=None, process=process(prompt)) for prompt in PROMPTS]
    )
    params = asking(max_tokens=40, ignore_eos=False, structured_outputs=StructuredOutputsParams(**{kind: rule}))
    both = [each for prompt in PROMPTS for each in (prompt, prompt)]
    found = generate(llm, both, [params, greedy(NEW_TOKENS)] * len(PROMPTS))
    check(found[0::2], expected, kind)
    check(found[1::2], case.expected(PROMPTS), "neighbours")
    for tokens in found[0::2]:
        assert tokens[-1] == end
        assert re.fullmatch(pattern, text_of(tokens[:-1]))
        if kind == "json":
            assert set(json.loads(text_of(tokens[:-1]))) == {"kind", "count"}


def test_priority_without_chunks(case: Case) -> None:
    """Priority scheduling, whole prompts only: a late urgent request overtakes, and all tokens are the same."""
    options = {"scheduling_policy": "priority", "enable_chunked_prefill": False, "max_num_seqs": 2}
    with engine(case.model_dir, case.caprese, **options) as llm:
        assert not llm.llm_engine.vllm_config.scheduler_config.enable_chunked_prefill
        for i, prompt in enumerate(PROMPTS):
            llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, greedy(NEW_TOKENS), priority=-i)
        ended: list[int] = []
        tokens: dict[int, list[int]] = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
                ended += [int(output.request_id)] if output.finished else []
        assert set(ended[:2]) == {2, 3}
    check([tokens[i] for i in range(len(PROMPTS))], case.expected(PROMPTS), "priority")


# The same question that vLLM's attention asks (vllm/v1/attention/backends/cpu_attn.py).
@pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM: FP8 KV cache on CPU requires x86 with AVX-512 or AMX",
)
def test_float8_kv_cache(case: Case) -> None:
    """vLLM's CPU attention rounds in ways of its own, so here plain vLLM is the reference, of all neurons."""
    options = {"kv_cache_dtype": "fp8"}
    with engine(case.model_dir, **options) as llm:
        expected = generate(llm, PROMPTS, greedy(NEW_TOKENS))
    assert any(
        tokens != each.tokens for tokens, each in zip(expected, case.expected(PROMPTS, method=None), strict=True)
    )
    with engine(case.model_dir, {"method": "griffin", "density": 1.0}, **options) as llm:
        assert generate(llm, PROMPTS, greedy(NEW_TOKENS)) == expected


def test_weights_reloaded(model_dir: ModelDir, tmp_path: Path) -> None:
    """`reload_weights`: other weights, in the same packed storage, with the same L and R."""
    case = new_case(model_dir, tmp_path, "qwen2", "griffin", True)
    other = make_model("qwen2", tmp_path / "other", seed=5)
    assert case.adapter is not None
    shutil.copy(case.adapter, other / "adapter.safetensors")  # must not be taken for weights, here either
    after = Case(other, "griffin", case.adapter)
    assert differing(after.expected(PROMPTS), case.expected(PROMPTS)) == len(PROMPTS)
    with engine(case.model_dir, case.caprese) as llm:
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
        check(generate(llm, PROMPTS, greedy(NEW_TOKENS)), case.expected(PROMPTS), "before")
        for directory, expected in ((other, after), (case.model_dir, case)):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
            assert llm.reset_prefix_cache()  # as in plain vLLM: what other weights computed
            check(generate(llm, PROMPTS, greedy(NEW_TOKENS)), expected.expected(PROMPTS), "after")
            for block in model.caprese.blocks:
                assert block.block.up.weight.data_ptr() == block.packed.gate_up_plus.data_ptr()
                assert block.block.down.weight.data_ptr() == block.packed.down_plus.data_ptr()
