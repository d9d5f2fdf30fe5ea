"""`apply`: a Hugging Face model's own `generate` against the method written out for one request alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from caprese_distill import apply
from caprese_kernels.errors import CapreseError
from tests.support.equality import BLOCK, NEW_TOKENS, ROUNDING, Case, check, differing
from tests.support.models import LAYERS, make_adapter, random_prompts

LENGTHS = (1, 2, 7, 33, 64, 100)
PAPER = {"score": "paper", "prior": 0.0, "core": 0.0}
WEIGHTED = {"score": "weighted", "prior": 0.5}
# By name: architecture, method, rank, and the settings of the selection (None: a file of version 1).
CASES: dict[str, tuple[str, str, int, dict[str, Any] | None]] = {
    "griffin, version 1": ("llama", "griffin", 8, None),
    "griffin, biases": ("llama-bias", "griffin", 8, WEIGHTED | {"core": 0.0}),
    "core 0": ("qwen2", "griffin", 8, WEIGHTED | {"core": 0.0}),
    "core 0.5": ("qwen3", "griffin", 8, WEIGHTED | {"core": 0.5}),
    "core 1": ("qwen2", "griffin", 8, WEIGHTED | {"core": 1.0}),
    "prior alone": ("llama", "griffin", 8, {"score": "paper", "prior": 1.0, "core": 0.25}),
    "rank 0": ("qwen2", "griffin", 0, WEIGHTED | {"core": 0.5}),
    "cats, version 1": ("gemma2", "cats", 8, None),
    "scaled cats": ("mistral", "cats", 8, {"score": "weighted", "prior": 0.0, "core": 0.0}),
    "cats, rank 0": ("qwen2", "cats", 0, {"score": "weighted", "prior": 0.0, "core": 0.0}),
}
MakeCase = Callable[[str], Case]


@pytest.fixture
def make_case(model_dir: Callable[[str], Path], tmp_path: Path) -> MakeCase:
    def make(name: str) -> Case:
        architecture, method, rank, selection = CASES[name]
        directory = model_dir(architecture)
        adapter = make_adapter(directory, tmp_path / "a.safetensors", method, rank=rank, selection=selection)
        return Case(directory, method, adapter, selection=selection)

    return make


def load(case: Case) -> Any:
    """A model of the test's own; with the reference's attention."""
    return AutoModelForCausalLM.from_pretrained(case.model_dir, dtype=torch.float32, attn_implementation="eager").eval()


def without_ties(case: Case) -> list[list[int]]:
    """The prompts in whose answers no two logits tie in the reference, and no neuron is at the selection's border."""
    prompts = random_prompts(LENGTHS)
    answers = [case.one(prompt) for prompt in prompts]
    clear = [p for p, answer in zip(prompts, answers, strict=True) if min(answer.margins) > ROUNDING]
    assert len(clear) >= len(prompts) - 1
    return clear


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A batch with padding on the left, by a token that is part of prompts elsewhere."""
    width = max(map(len, prompts))
    ids = [[7] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(model: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    """NEW_TOKENS greedy tokens of each prompt of a batch, past the end-of-sequence token, as the reference's."""
    model.generation_config.eos_token_id = None
    batch = padded(prompts)
    made = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=7, **settings)
    return made[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_the_reference(make_case: MakeCase, name: str) -> None:
    """Each prompt alone, and all in one batch with padding."""
    case = make_case(name)
    prompts = without_ties(case)
    expected = case.expected(prompts)
    assert differing(expected, case.expected(prompts, method=None)) >= len(prompts) // 2, "sparsity must show"
    if CASES[name][2]:
        plain = [case.one(prompt, left={}, right={}) for prompt in prompts]
        assert differing(expected, plain) >= len(prompts) // 2, "the adapter must show"
    model = load(case)
    with apply(model, case.adapter):
        check([tokens for prompt in prompts for tokens in generate(model, [prompt])], expected, f"{name}, alone")
        check(generate(model, prompts), expected, f"{name}, in a batch")
        check(generate(model, prompts[::-1]), expected[::-1], f"{name}, in another order")


def test_settings_go_before_the_adapters(make_case: MakeCase) -> None:
    """The plain method without an adapter; and an adapter at another density, with a warning."""
    case = make_case("core 0.5")
    plain = Case(case.model_dir, "cats", density=0.3, layers=[0, 2])
    prompts, model = random_prompts((5, 40)), load(case)
    with apply(model, method="cats", density=0.3, layers=[0, 2]) as sparse:
        assert str(sparse).startswith("Caprese: 2 of 4 FF blocks replaced: method cats, density 0.3, rank 0")
        check(generate(model, prompts), plain.expected(prompts), "plain CATS")
    with pytest.warns(UserWarning, match=r"density 0.25 is served with an adapter distilled at 0.5"):
        handle = apply(model, case.adapter, density=0.25)
    with handle:
        check(generate(model, prompts), case.expected(prompts, density=0.25), "another density")


@pytest.mark.parametrize("name", ["core 0.5", "scaled cats"])
def test_beams_and_samples(make_case: MakeCase, name: str) -> None:
    """Beams of one prompt share its selection, in any order; so do samples. By log-probabilities."""
    case = make_case(name)
    model, prompts = load(case), random_prompts((6, 40), seed=3)
    model.generation_config.eos_token_id = None
    shared: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 7, "return_dict_in_generate": True}
    batch = padded(prompts)
    with apply(model, case.adapter):
        beams = model.generate(
            **batch, num_beams=4, num_return_sequences=2, length_penalty=0.0, output_scores=True, **shared
        )
        samples = model.generate(**batch, do_sample=True, num_return_sequences=2, top_k=0, output_logits=True, **shared)
    answers = [each.sequences[:, batch["input_ids"].shape[1] :] for each in (beams, samples)]
    logprobs = torch.stack(samples.logits, dim=1).log_softmax(dim=2).gather(2, answers[1][..., None])[..., 0]
    assert len({tuple(tokens) for made in answers for tokens in made.tolist()}) == 8, "answers must differ"
    for row in range(4):
        prompt = prompts[row // 2]
        reference = [case.one(prompt, forced=made[row].tolist(), new_tokens=12) for made in answers]
        dense = case.one(prompt, forced=answers[0][row].tolist(), new_tokens=12, method=None)
        # Rounding of 12 log-probabilities; a neuron at the border of the selection may fall on either side.
        slack = 1e-3 if min(each.closest for each in reference) > 1e-5 else 1e-1
        assert float(beams.sequences_scores[row]) == pytest.approx(sum(reference[0].logprobs), abs=slack)
        assert float(beams.sequences_scores[row]) != pytest.approx(sum(dense.logprobs), abs=0.5)
        assert logprobs[row].tolist() == pytest.approx(reference[1].logprobs, abs=slack)


@pytest.mark.parametrize("name", ["core 0", "scaled cats"])
def test_chunked_prompts(make_case: MakeCase, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics add up over chunks, the first of which may be all padding."""
    case = make_case(name)
    prompts, model = random_prompts((7, 64, 100)), load(case)
    expected = case.expected(prompts)
    with apply(model, case.adapter):
        check(generate(model, prompts, prefill_chunk_size=BLOCK), expected, "in chunks")
        with pytest.raises(CapreseError, match=r"prefill_chunk_size: expected a last chunk of more than one position"):
            generate(model, prompts, prefill_chunk_size=33)
        # Beyond EXACT_VALUES magnitudes are counted, and what was kept until then is counted with them.
        monkeypatch.setattr("caprese_kernels.reference.EXACT_VALUES", 70 * 160)
        whole = generate(model, prompts)
        assert generate(model, prompts, prefill_chunk_size=BLOCK) == whole


def test_a_loop_of_ones_own(make_case: MakeCase) -> None:
    """Two caches in turn: each keeps its selection. Passes without a cache are dense."""
    case = make_case("core 0.5")
    prompts, model = random_prompts((9, 50), seed=4), load(case)
    expected = case.expected(prompts)
    with apply(model, case.adapter), torch.inference_mode():
        outputs = [model(torch.tensor([prompt])) for prompt in prompts]
        tokens: list[list[int]] = [[], []]
        for _ in range(NEW_TOKENS):
            for i, output in enumerate(outputs):
                token = output.logits[:, -1:].argmax(dim=-1)
                tokens[i].append(int(token))
                outputs[i] = model(token, past_key_values=output.past_key_values)
        check(tokens, expected, "two caches in turn")
        text = torch.tensor([prompts[0] + tokens[0]])
        sparse = [model(text).logits, model(text, use_cache=False).logits]
    with torch.inference_mode():
        assert all(torch.equal(logits, model(text).logits) for logits in sparse), "a text alone is a prompt"


@pytest.mark.parametrize("name", ["core 0.5", "cats, version 1"])
def test_remove_restores_the_model(make_case: MakeCase, name: str) -> None:
    case = make_case(name)
    model, prompts = load(case), random_prompts((5, 40))
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = {key: dict(vars(module)) for key, module in model.named_modules()}
    hooks = [f"_forward{kind}hooks" for kind in ("_", "_pre_")]
    before = generate(model, prompts)
    sparse = apply(model, case.adapter)
    assert generate(model, prompts) != before
    with pytest.raises(CapreseError, match=r"apply\(\): expected a model without Caprese; found one that has it; call"):
        apply(model, case.adapter)
    sparse.remove()
    sparse.remove()
    assert generate(model, prompts) == before
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    for key, module in model.named_modules():
        assert set(vars(module)) == set(attributes[key])
        assert not any(vars(module)[kind] for kind in hooks)
    with apply(model, case.adapter):  # and again
        assert generate(model, prompts) != before


def test_an_adapter_of_another_model(make_case: MakeCase, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    case = make_case("core 0.5")
    other = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    with pytest.raises(CapreseError, match=r"made for another model .* expected architecture 'Qwen3ForCausalLM'"):
        apply(other, case.adapter)
    with pytest.raises(CapreseError, match=r"adapter weights: expected a file, .* found nothing at"):
        apply(other, tmp_path / "none.safetensors")
    with pytest.raises(CapreseError, match=r"apply\(\): expected settings among method, .* found \['kernel'\]; leave"):
        apply(other, case.adapter, kernel="cpu")
    directory = model_dir("opt")
    ungated = make_adapter(directory, tmp_path / "opt.safetensors", "griffin")
    with pytest.raises(CapreseError, match=r"FF block of layer 0: expected a gated FF block .* found no module mlp"):
        apply(AutoModelForCausalLM.from_pretrained(directory), ungated)
    assert "generate" not in vars(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, r"prompt_lookup_num_tokens: expected none: .* found given; leave it out"),
        ({"use_cache": False}, r"use_cache: expected True: .* found False; leave it out"),
        ({"cache_implementation": "static"}, r"past_key_values: expected a cache that grows.* found StaticCache; use"),
    ],
)
def test_ways_to_generate_that_are_refused(make_case: MakeCase, settings: dict[str, Any], message: str) -> None:
    case = make_case("core 0.5")
    model = load(case)
    with apply(model, case.adapter), pytest.raises(CapreseError, match=message):
        generate(model, random_prompts((5,)), **settings)
    with apply(model, case.adapter), pytest.raises(CapreseError, match=r"^assistant_model"):
        generate(model, random_prompts((5,)), assistant_model=model)


@torch.inference_mode()
def test_passes_that_are_refused(make_case: MakeCase) -> None:
    """A cache whose text was not seen by these rows, and masks of another kind."""
    case = make_case("core 0.5")
    model, ids = load(case), torch.tensor(random_prompts((8, 8)))
    foreign = model(ids).past_key_values
    one, two = ids[:, :1], ids[:, :2]
    with apply(model, case.adapter):
        with pytest.raises(CapreseError, match=r"found a cache that was filled elsewhere; give the whole text"):
            model(one, past_key_values=foreign)
        cache = model(ids).past_key_values
        cache.crop(-2)
        with pytest.raises(CapreseError, match=r"found 2 rows of 6 positions, where 2 rows of 8 positions were seen"):
            model(one, past_key_values=cache)
        cache = model(ids).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(CapreseError, match=r"found 1 rows of 8 positions, where 2 rows of 8"):
            model(one[:1], past_key_values=cache)
        cache = model(ids).past_key_values
        model(one, past_key_values=cache)
        with pytest.raises(CapreseError, match=r"found 2 positions at once after generated tokens"):
            model(two, past_key_values=cache)
        with pytest.raises(CapreseError, match=r"attention_mask: expected a mask of padding, 2 rows of 8 positions"):
            model(ids, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool))
        mask = torch.ones_like(ids)
        mask[1] = 0
        cache = model(ids, attention_mask=mask).past_key_values
        with pytest.raises(CapreseError, match=r"prompts: expected a token in every row; found only padding in row 1"):
            model(one, attention_mask=torch.ones(2, 9), past_key_values=cache)
        with pytest.raises(CapreseError, match=r"found StaticCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))
        empty = DynamicCache(config=model.config)
        assert model(ids, past_key_values=empty).past_key_values is empty
        model(one, past_key_values=empty)


def test_a_block_that_is_bypassed(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A patched block that never calls its modules would silently stay dense."""
    case = make_case("core 0.5")
    model = load(case)
    monkeypatch.setattr(model.get_decoder().layers[1].mlp, "forward", lambda x: x)
    with apply(model, case.adapter), pytest.raises(CapreseError, match=r"FF block of layer 1: expected its modules"):
        generate(model, random_prompts((5,)))
    assert LAYERS == 4


def test_the_models_dtype_counts(make_case: MakeCase) -> None:
    """L and R follow the weights, when the model changes its dtype after `apply`, too."""
    case = make_case("core 0.5")
    prompts, model = random_prompts((5, 40)), load(case).to(torch.bfloat16)
    with apply(model, case.adapter):
        half = generate(model, prompts)
        model.float()
        whole = generate(model, prompts)
    assert half != whole


@pytest.mark.parametrize("name", ["core 0.5", "scaled cats"])
def test_lm_eval(make_case: MakeCase, name: str) -> None:
    """lm-eval's `hf` model: generated texts of a batch are those of each prompt alone; likelihoods are dense."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    case = make_case(name)
    model, tokenizer = load(case), AutoTokenizer.from_pretrained(case.model_dir)
    texts = ["one two three", "four", "five six seven eight nine ten one two three four five six", "two nine"]
    rest = {"doc": {}, "idx": 0}
    options = {"until": ["<|end|>"], "max_gen_toks": 16, "do_sample": False}
    asked = [Instance(request_type="generate_until", arguments=(text, options), **rest) for text in texts]
    pairs = [(text, " seven eight") for text in texts]
    likely = [Instance(request_type="loglikelihood", arguments=pair, **rest) for pair in pairs]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=256)
    dense, dense_scores = lm.generate_until(asked, disable_tqdm=True), lm.loglikelihood(likely, disable_tqdm=True)
    with apply(model, case.adapter):
        found, scores = lm.generate_until(asked, disable_tqdm=True), lm.loglikelihood(likely, disable_tqdm=True)
    expected = []
    for text in texts:
        answer = case.one(lm.tok_encode(text), 16, eos=tokenizer.eos_token_id)
        assert min(answer.margins) > ROUNDING
        expected.append(lm.tok_decode([token for token in answer.tokens if token != tokenizer.eos_token_id]))
    assert found == expected
    assert found != dense
    assert scores == dense_scores
