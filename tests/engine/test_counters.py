"""What the engine counts, in GET /caprese and as metrics, against what it was asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams

from caprese_kernels.adapters import read_config
from caprese_vllm.metrics import METRICS, set_metrics
from caprese_vllm.state import merge
from tests.support.engine import engine, generate, greedy
from tests.support.equality import BLOCK
from tests.support.models import make_adapter, random_prompts

ModelDir = Callable[[str], Path]
PROMPTS = random_prompts((40, 17, 9), seed=4)
NEW = 6  # tokens of each answer; the first comes of the prompt


def report(llm: LLM) -> dict[str, Any]:
    return merge(llm.collective_rpc("caprese_report"))


def metric(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"caprese:{name}", labels)


@pytest.mark.parametrize("core", [0.0, 0.5])
def test_griffin(model_dir: ModelDir, tmp_path: Path, core: float) -> None:
    selection = {"score": "weighted", "prior": 0.5, "core": core}
    path = make_adapter(model_dir("llama"), tmp_path / "a.safetensors", "griffin", rank=8, selection=selection)
    config = read_config(path)
    base, layers, size = config.base_model, len(config.layers), 4  # bytes of a float32
    with engine(model_dir("llama"), {"weights": str(path)}) as llm:
        assert report(llm)["off_tokens"] == report(llm)["neurons"] == 0
        generate(llm, PROMPTS, [greedy(NEW), greedy(NEW), greedy(NEW, caprese="off")])
        found = report(llm)
    sparse, kept = 2 * (NEW - 1), base.intermediate_size // 2
    assert (found["generated_tokens"], found["off_tokens"]) == (sparse, NEW - 1)
    assert found["neurons"] == sparse * layers * base.intermediate_size
    assert found["neurons_kept"] == sparse * layers * kept
    assert found["neurons_core"] == sparse * layers * int(core * kept)
    assert found["ff_bytes_dense"] == sparse * layers * 3 * base.hidden_size * base.intermediate_size * size
    needed = (3 * kept + 2 * config.rank) * base.hidden_size * size
    assert found["ff_bytes_needed"] == sparse * layers * needed
    untouched = 1 - layers / base.num_hidden_layers
    share = found["ff_bytes_needed"] / found["ff_bytes_dense"]
    assert found["ff_weights_read"] == pytest.approx(untouched + share * layers / base.num_hidden_layers)
    set_metrics(found)
    assert metric("generated_tokens_total", path="sparse") == sparse
    assert metric("generated_tokens_total", path="off") == NEW - 1
    for each in METRICS:
        if each.label is None and (core or not each.core):
            assert metric(each.name) == each.read(found), each.name
    if core:
        assert metric("neurons_core_total") == found["neurons_core"]


def test_cats_keeps_what_it_counts(model_dir: ModelDir) -> None:
    """At density 1 every neuron, at 0.5 about half of them; the gate is needed whole."""
    for density, low, high in ((1.0, 1.0, 1.0), (0.5, 0.3, 0.7)):
        with engine(model_dir("llama"), {"method": "cats", "density": density}) as llm:
            generate(llm, PROMPTS, greedy(NEW))
            found = report(llm)
        share = found["neurons_kept"] / found["neurons"]
        assert low <= share <= high
        assert found["ff_bytes_needed"] / found["ff_bytes_dense"] == pytest.approx((1 + 2 * share) / 3)


def test_pages_of_statistics(model_dir: ModelDir) -> None:
    """The second prompt begins with a page that the first has left; requests with Caprese off have nothing to do."""
    prefix = random_prompts((3 * BLOCK,), seed=7)[0]
    with engine(model_dir("llama"), {"method": "griffin"}, enable_prefix_caching=True) as llm:

        def ask(tail: int, off: bool = False) -> tuple[int, int]:
            params = SamplingParams(max_tokens=1, extra_args={"caprese": "off"} if off else None)
            llm.generate([{"prompt_token_ids": [*prefix, tail]}], params, use_tqdm=False)
            found = report(llm)
            assert found["statistics_pages"] > 0
            return found["pages_written"], found["pages_read"]

        assert ask(5, off=True) == (0, 0)
        written, read = ask(6)
        assert (written > 0, read) == (True, 0)
        assert ask(7) == (written, 1)
