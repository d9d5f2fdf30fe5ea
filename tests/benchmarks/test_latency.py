"""The latency benchmark: its floor by hand, figures from known times, and counters that contradict a variant."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from caprese_bench.engine.engines import groups, settings_of
from caprese_bench.engine.latency_cases import BATCH, ONE, SAMPLES, Case, make_cases
from caprese_bench.engine.latency_measure import Run, check_counters, kept_share
from caprese_bench.engine.latency_rows import rows
from caprese_bench.engine.models import write_arch
from caprese_bench.engine.timed_model import TimedModel, adapter_for, configured_variants, load_timed_model, prompts
from caprese_bench.engine.variants import VARIANTS, Variant, choose_variants
from caprese_bench.kernels.floor import Weights, step_bytes, step_flops
from caprese_bench.results import schemas
from caprese_kernels.adapters import Adapters
from caprese_kernels.config import DEFAULT_LAYERS, BaseModelInfo, CapreseConfig, Method, resolve, resolve_layers
from caprese_kernels.errors import CapreseError
from caprese_serve.demo import ADAPTERS, MODEL

# D = 10, F = 30: an FF block has 3 x 300 values. Four layers, 1,000 values elsewhere, 200 of them looked up.
WEIGHTS = Weights(total=1000 + 4 * 900, lookup=200, ff=900, gate=300, layers=4, hidden_size=10, neurons=30, kv=8)


def timed_model(**fields: Any) -> TimedModel:
    config = AutoConfig.for_model(
        "qwen2", hidden_size=10, intermediate_size=30, num_hidden_layers=4, architectures=["Qwen2ForCausalLM"]
    )
    given = TimedModel("path", "tiny", config, WEIGHTS, True, density=0.5, rank=2, dtype="bfloat16")
    return replace(given, **fields)


def test_the_floor_by_hand() -> None:
    assert step_bytes(WEIGHTS) == 2 * (800 + 3600)
    assert step_bytes(WEIGHTS, itemsize=4, context=5, batch=3) == 4 * (800 + 3600 + 3 * 5 * 8)
    # Half of two blocks; and 40 values of a correction in each.
    assert step_bytes(WEIGHTS, "griffin", sparse_layers=2, kept=0.5, added=40) == 2 * (4400 - 900 + 80)
    assert step_flops(WEIGHTS, "griffin", sparse_layers=2, kept=0.5, added=40) == 2 * (4400 - 900 + 80)
    # The gate is read whole.
    assert step_bytes(WEIGHTS, "cats", sparse_layers=4, kept=0.25) == 2 * (4400 - 4 * 0.75 * 600)


def test_the_floor_of_the_papers_model(tmp_path: Path) -> None:
    weights = Weights.of(AutoConfig.from_pretrained(write_arch("qwen2.5-14b", tmp_path)))
    assert weights.total - weights.lookup == pytest.approx(13.99e9, rel=1e-3)
    added = 2 * 5120 * 256
    for method, layers, ratio in (("griffin", 24, 0.822), ("griffin", 48, 0.645), ("cats", 48, 0.766)):
        found = step_bytes(weights, method, layers, 0.5, added) / step_bytes(weights)
        assert found == pytest.approx(ratio, abs=5e-4)
    assert step_bytes(weights, context=2048) - step_bytes(weights) == 2048 * 48 * 2 * 8 * 128 * 2


def test_cases() -> None:
    cases = make_cases("2048+256, 8+2", "1,4", "2")
    assert cases == [
        Case(ONE, 2048, 256),
        Case(ONE, 8, 2),
        Case(BATCH, 2048, 256, batch=1),
        Case(BATCH, 2048, 256, batch=4),
        Case(SAMPLES, 2048, 256, samples=2),
    ]
    for wrong in ("2048", "2048+1", "0+4", "a+b", ""):
        with pytest.raises(CapreseError, match=r"--setups: expected P\+G"):
            make_cases(wrong, "", "")
    with pytest.raises(CapreseError, match="--n: expected comma-separated whole numbers from 1"):
        make_cases("8+2", "", "2,0")
    with pytest.raises(CapreseError, match="--variants: expected some of full, griffin"):
        choose_variants("full,dense")
    with pytest.raises(CapreseError, match="--variants: expected full among them"):
        choose_variants("griffin,caprese")


def test_who_runs_together() -> None:
    full, *others = [VARIANTS[name] for name in ("full", "griffin", "lora", "caprese", "cats", "caprese-cats")]
    assert groups([full, *others], 6) == [[full, *others]]
    assert groups([full, *others], 4) == [[full, *others[:3]], [full, *others[3:]]]
    assert groups([full, *others], 2) == [[full, other] for other in others]
    with pytest.raises(CapreseError, match="room for two engines"):
        groups([full, *others], 1)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.id)
@pytest.mark.parametrize("layers", [4, 7])
def test_default_layers_are_the_methods(variant: Variant, layers: int) -> None:
    if variant.method is None:
        assert not variant.sparse_layers(layers)
    else:
        choice = "all" if variant.layers == "all" else DEFAULT_LAYERS[variant.method]
        assert tuple(variant.sparse_layers(layers)) == resolve_layers(choice, layers)


def test_corrections_have_as_many_parameters() -> None:
    big = timed_model(
        config=AutoConfig.for_model(
            "qwen2", hidden_size=1536, intermediate_size=8960, architectures=["Qwen2ForCausalLM"]
        ),
        rank=256,
    )
    weights = replace(WEIGHTS, hidden_size=1536)
    ours, lora = (replace(big, weights=weights).added(VARIANTS[name]) for name in ("caprese", "lora"))
    assert ours == 2 * 1536 * 256
    assert lora == pytest.approx(ours, rel=0.03)
    assert replace(big, weights=weights).added(VARIANTS["griffin"]) == 0


@pytest.mark.parametrize(
    "name", ["griffin", "caprese", "cats", "caprese-cats", "caprese-all", "core", "caprese-core-all"]
)
def test_the_share_kept_is_found_in_the_share_read(name: str) -> None:
    variant, model = VARIANTS[name], timed_model()
    sparse, depth, kept = len(model.layers(variant)), 10, 0.4
    low_rank = 2 * depth * model.rank if variant.correction == "caprese" else 0
    read = 900 * kept if variant.method == "griffin" else 300 + 600 * kept
    share = ((4 - sparse) + sparse * (read + low_rank) / 900) / 4
    assert kept_share(model, variant, share) == pytest.approx(kept)


def counters(name: str, tokens: int, **changes: Any) -> dict[str, Any]:
    """What an engine's counters report of a variant that ran as it should."""
    variant, model = VARIANTS[name], timed_model()
    method = model.method_of(variant)
    assert method is not None
    sparse, rank = len(method.layers), method.rank
    read = 450 if variant.method == "griffin" else 600
    return {
        "method": variant.method,
        "layers": list(method.layers),
        "rank": rank,
        "density": 0.5,
        "score": method.score,
        "prior": method.prior,
        "core": method.core,
        "kernel": "lora over cpu" if variant.correction == "lora" else "cpu",
        "generated_tokens": tokens,
        "ff_weights_read": ((4 - sparse) + sparse * (read + 20 * rank) / 900) / 4,
    } | changes


CASE = Case(ONE, 100, 5)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "full"])
def test_counters_that_fit_are_a_check_counters(name: str) -> None:
    path = check_counters(timed_model(), VARIANTS[name], CASE, 3, counters(name, 7), counters(name, 7 + 12))
    assert path["sparse_tokens"] == 12
    assert path["kept_share"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("griffin", {"generated_tokens": 18}, "12 tokens generated by sparse FF blocks; found 11"),
        ("griffin", {"layers": [0]}, r"griffin in layers \[0, 1\]"),
        ("griffin", {"method": "cats"}, "griffin in layers"),
        ("griffin", {"ff_weights_read": 0.9}, "50% of the neurons kept; found 80.0%"),
        ("griffin", {"kernel": "lora over cpu"}, "no LoRA"),
        ("lora", {"kernel": "cpu"}, "variant lora: expected LoRA; found cpu"),
        ("caprese", {"rank": 0}, "rank 2; found 0"),
        ("core", {"core": 0.0}, r"core 1\.0; found 0"),
        ("core-tail-all", {"core": 1.0}, r"core 0\.8; found 1"),
        ("griffin", {"score": "weighted"}, "score paper; found weighted"),
        ("cats", {"ff_weights_read": 1.0}, "50% of the neurons kept; found 100.0%"),
    ],
)
def test_a_variant_that_ran_otherwise_fails(name: str, changes: dict[str, Any], message: str) -> None:
    before = counters(name, 7)
    after = counters(name, 19, **changes)
    if "ff_weights_read" in changes:
        before["ff_weights_read"] = changes["ff_weights_read"]
    with pytest.raises(CapreseError, match=message):
        check_counters(timed_model(), VARIANTS[name], CASE, 3, before, after)


def test_full_must_be_plain_and_a_method_must_not() -> None:
    assert check_counters(timed_model(), VARIANTS["full"], CASE, 3, None, None) == {}
    with pytest.raises(CapreseError, match="variant full: expected plain vLLM"):
        check_counters(timed_model(), VARIANTS["full"], CASE, 3, None, counters("griffin", 12))
    with pytest.raises(CapreseError, match="variant cats: expected cats in layers"):
        check_counters(timed_model(), VARIANTS["cats"], CASE, 3, None, None)


def answer(first: float, step: float) -> dict[str, Any]:
    """Two requests of five tokens; the second's steps take twice as long."""
    times = [[first + i * step for i in range(5)], [first + 2 * i * step for i in range(5)]]
    return {"times": times, "cached": [0, 0], "max_tokens": 5}


def test_figures_from_known_times(tmp_path: Path) -> None:
    full = Run(VARIANTS["full"], [answer(1.0, 0.1), answer(1.0, 0.2), answer(1.0, 0.3)], 1.0, {})
    path = {"sparse_tokens": 24, "ff_weights_read": 0.75, "kept_share": 0.5, "kernel": "cpu"}
    griffin = Run(VARIANTS["griffin"], [answer(2.0, 0.05), answer(2.0, 0.16), answer(2.0, 0.3)], 0.6, path)
    plain, row = rows(Case(BATCH, 100, 5, batch=2), timed_model(), [full, griffin], bandwidth=1e-3)
    assert (plain["ratio"], plain["predicted_ratio"], plain["variant"]) == (1, 1, "Full")
    assert row["tpot_ms"] == pytest.approx(1e3 * 0.16 * 1.5)  # means over requests, the median round
    assert row["full_tpot_ms"] == pytest.approx(1e3 * 0.2 * 1.5)
    assert (row["ttft_s"], row["e2e_s"]) == (2.0, pytest.approx(2 + 4 * 2 * 0.16))
    assert row["ratio"] == pytest.approx(0.8)  # of .5, .8 and 1
    assert row["ratio_iqr"] == pytest.approx(0.25)
    assert row["e2e_ratio"] == pytest.approx((2 + 8 * 0.3) / (1 + 8 * 0.3))  # the median of the rounds' ratios
    # The rounds' median steps: .15 .3 .45 of Full, .075 .24 .45.
    assert row["step_ratio"] == pytest.approx(0.8)
    assert row["throughput_ratio"] == pytest.approx(1.25)
    assert row["predicted_flop_ratio"] == pytest.approx((4400 - 2 * 0.5 * 900) / 4400)
    assert row["tpot_p50_ms"] == pytest.approx(1e3 * (0.16 + 0.3) / 2)  # steps of .05 .1 .16 .32 .3 .6, four each
    assert row["tpot_p99_ms"] == pytest.approx(600)
    needed = 2 * (4400 - 2 * 0.4 * 900 + 2 * 102.5 * 8)
    assert row["mb_a_step"] == pytest.approx(needed / 1e6)
    assert row["predicted_ratio"] == pytest.approx(needed / (2 * (4400 + 2 * 102.5 * 8)))
    assert row["gb_s"] == pytest.approx(needed / 0.24 / 1e9)
    assert row["bandwidth_share"] == pytest.approx(needed / 0.24 / 1e6)
    assert row["tokens_per_s"] == pytest.approx(2 / 0.24)
    for each in (plain, row):
        schemas.ROWS["latency"].model_validate(each)


def test_prompts_differ_but_not_between_engines(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model = timed_model()
    first, again = (prompts(model, None, 3, 8, seed=1) for _ in range(2))
    assert first == again
    assert first != prompts(model, None, 3, 8, seed=2)
    assert len({tuple(prompt) for prompt in first}) == 3
    assert {len(prompt) for prompt in first} == {8}
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": "Ann has 3 apples."}) + "\n")
    real = timed_model(path=str(model_dir("llama")))
    made = prompts(real, str(text), 2, 9, seed=0)
    assert [len(prompt) for prompt in made] == [9, 9]


def test_an_adapters_settings_go_before_the_others(tmp_path: Path) -> None:
    path = str(ADAPTERS["griffin"])
    made = load_timed_model("", str(MODEL), [path], 0.3, 7, "float32", tmp_path)
    plain, caprese, everywhere = (VARIANTS[id] for id in ("griffin", "caprese", "caprese-all"))
    assert made.method_of(plain) == Method("griffin", 0.5, (0, 1), 0)
    assert made.method_of(caprese) == Method("griffin", 0.5, (0, 1), 48)
    assert made.method_of(VARIANTS["cats"]) == Method("cats", 0.3, (0, 1, 2, 3), 0)
    assert made.method_of(VARIANTS["caprese-core"]) == Method("griffin", 0.3, (0, 1), 7, "weighted", 0.5, 1.0)
    assert made.lora_as == 48
    assert adapter_for(made, caprese, tmp_path) == Path(path)
    with pytest.raises(CapreseError, match=r"an adapter for layers \[0, 1, 2, 3\]; found griffin.*for layers \[0, 1\]"):
        adapter_for(made, everywhere, tmp_path)
    with pytest.raises(CapreseError, match="variant caprese-cats: expected an adapter for cats"):
        adapter_for(made, VARIANTS["caprese-cats"], tmp_path)
    with pytest.raises(CapreseError, match="--weights: expected --model"):
        load_timed_model("qwen2.5-0.5b", None, [path], 0.5, 256, "float32", tmp_path)


@pytest.mark.parametrize("name", ["core", "core-tail-all", "caprese-core-all", "caprese"])
def test_random_adapters_are_what_their_variants_serve(tmp_path: Path, name: str) -> None:
    """The same values each time, with a prior where a core needs one; they resolve to the variant's method."""
    made, variant = load_timed_model("", str(MODEL), [], 0.5, 7, "float32", tmp_path), VARIANTS[name]
    made = replace(made, dummy=True)
    method = made.method_of(variant)
    path = adapter_for(made, variant, tmp_path)
    settings = settings_of(made, variant, {}, tmp_path)
    assert settings.caprese == {"weights": str(path)}
    adapter = Adapters.load(path)
    config = CapreseConfig.model_validate(settings.caprese)
    assert resolve(config, adapter.config, BaseModelInfo.from_hf(made.config, "demo"))[0] == method
    assert bool(adapter.prior) is ("core" in name)
    assert bool(adapter.left) is ("caprese" in name)
    path.unlink()
    again = Adapters.load(adapter_for(made, variant, tmp_path)).tensors()
    assert all(torch.equal(again[key], tensor) for key, tensor in adapter.tensors().items())


def test_a_configuration_of_the_users_is_a_variant(tmp_path: Path) -> None:
    made = load_timed_model("", str(MODEL), [], 0.5, 7, "float32", tmp_path)
    file = adapter_for(made, VARIANTS["core"], tmp_path)
    (tail,) = configured_variants(made, [f'tail={{"weights": "{file}", "core": 0.4, "density": 0.3}}'])
    assert made.method_of(tail) == Method("griffin", 0.3, (0, 1), 0, "weighted", 0.5, 0.4)
    assert settings_of(made, tail, {}, tmp_path).caprese == {"weights": str(file), "core": 0.4, "density": 0.3}
    assert (tail.label, made.added(tail), made.layers(tail)) == ("tail", 0, (0, 1))
    with pytest.raises(CapreseError, match="--config: expected a new name; found 'core'"):
        configured_variants(made, ['core={"method": "griffin"}'])
