"""`caprese bench parameters`: totals as published, shares as in the paper."""

import json
from pathlib import Path

import pytest
from transformers import OPTConfig

from caprese_bench.paper.counts import count, count_published
from caprese_bench.paper.families import FAMILIES, config
from caprese_bench.recovery.parameters import parameters, row
from caprese_kernels.errors import CapreseError
from caprese_serve.demo import MODEL

PUBLISHED = {  # "Model size" of the safetensors files on the Hub
    "Llama 3.2 1B": 1_235_814_400,
    "Llama 3.2 3B": 3_212_749_824,
    "Llama 3.1 8B": 8_030_261_248,
    "Llama 3.1 70B": 70_553_706_496,
    "Llama 3.1 405B": 405_853_388_800,
    "Gemma 2 2B": 2_614_341_888,
    "Gemma 2 9B": 9_241_705_984,
    "Gemma 2 27B": 27_227_128_320,
    "Qwen2.5 0.5B": 494_032_768,
    "Qwen2.5 1.5B": 1_543_714_304,
    "Qwen2.5 3B": 3_085_938_688,
    "Qwen2.5 7B": 7_615_616_512,
    "Qwen2.5 14B": 14_770_033_664,
    "Qwen2.5 32B": 32_763_876_352,
    "Qwen2.5 72B": 72_706_203_648,
}


def test_totals_are_those_published() -> None:
    counts = [count_published(name, model) for name, family in FAMILIES.items() for model in family.models]
    assert {each.name: each.total for each in counts} == PUBLISHED


@pytest.mark.parametrize(
    ("family", "model"), [(name, model) for name, each in FAMILIES.items() for model in each.models]
)
def test_formulas_count_what_transformers_builds(family: str, model: str) -> None:
    assert count_published(family, model) == count(model, config(family, model), family)


def test_shares_the_paper_states() -> None:
    llama, gemma = (count(name, config(name[:7], name)) for name in ("Llama 3.1 8B", "Gemma 2 9B"))
    for model in (llama, gemma):  # section 1: "roughly 0.8% additional parameters", "~2B cut" with CATS
        made = row("all layers", model, 256, 0.5)
        assert made["added_of_model"] == pytest.approx(0.008, abs=0.0005)
        assert made["cut_cats"] * model.total == pytest.approx(2e9, rel=0.12)
    small = count("Llama 3.2 3B", config("Llama 3", "Llama 3.2 3B"))
    # Section 4.2: "15.8% less compute" with GRIFFIN, on the first half of the layers.
    assert row("first half of the layers", small, 256, 0.5)["cut_griffin"] == pytest.approx(0.158, abs=0.0005)


def test_the_verb(tmp_path: Path) -> None:
    parameters(rank=48, density=0.5, model=[str(MODEL)], quick=False, out=tmp_path)
    result = json.loads((tmp_path / "parameters.json").read_text())
    recorded = json.loads((MODEL / "training.json").read_text())
    assert [r["parameters"] for r in result["rows"]] == [recorded["parameters"]] * 2
    assert [r["added"] for r in result["rows"]] == [4 * 2 * 128 * 48, 2 * 2 * 128 * 48]
    parameters(rank=256, density=0.5, model=None, quick=True, out=tmp_path)
    assert "Qwen2.5 0.5B" in (tmp_path / "parameters.html").read_text()
    with pytest.raises(CapreseError, match=r"--model .*/none: expected a model directory"):
        parameters(rank=48, density=0.5, model=[str(tmp_path / "none")], quick=False, out=tmp_path)
    with pytest.raises(CapreseError, match="gated FF block"):
        count("opt", OPTConfig(num_hidden_layers=1))
