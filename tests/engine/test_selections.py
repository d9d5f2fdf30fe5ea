"""GET /caprese/selections/ID shows what requests selected, compared with selections made by transformers' own model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm import LLM

from caprese_kernels.adapters import Adapters
from caprese_vllm.selections import BINS, merge_selections
from tests.support.engine import engine, generate, greedy
from tests.support.models import make_adapter, random_prompts

ModelDir = Callable[[str], Path]
PROMPTS = random_prompts((40, 17, 9), seed=4)
CORE = {"score": "weighted", "prior": 0.5, "core": 0.5}


def selections(llm: LLM, name: str) -> dict[str, Any] | None:
    return merge_selections(llm.collective_rpc("caprese_selections", args=(name,)))


def activations(model_dir: Path, prompt: list[int], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """g, z [T, F] of a prompt, and ||w2_j|| [F], float64."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    block, seen = model.get_decoder().layers[layer].mlp, {}
    block.act_fn.register_forward_hook(lambda module, inputs, output: seen.update(g=output))
    block.down_proj.register_forward_pre_hook(lambda module, inputs: seen.update(z=inputs[0]))
    with torch.inference_mode():
        model(torch.tensor([prompt]))
        norms = block.down_proj.weight.double().norm(dim=0)
    return seen["g"].double().reshape(len(prompt), -1), seen["z"][0].double(), norms


def shares(neurons: Tensor, size: int) -> list[float]:
    """Of each bin, the share of its neurons that is among the given ones."""
    bins, parts = min(BINS, size), [0.0] * min(BINS, size)
    inside = [[j for j in range(size) if j * bins // size == b] for b in range(bins)]
    chosen = set(neurons.tolist())
    for b, members in enumerate(inside):
        parts[b] = sum(j in chosen for j in members) / len(members)
    return parts


@pytest.mark.parametrize("selection", [None, CORE], ids=["paper", "core"])
def test_the_neurons_of_a_request(model_dir: ModelDir, tmp_path: Path, selection: dict[str, Any] | None) -> None:
    """While it runs, and after it has ended; in the checkpoint's order of neurons, of each request its own."""
    directory = model_dir("llama")
    path = make_adapter(directory, tmp_path / "a.safetensors", "griffin", rank=8, selection=selection)
    adapters = Adapters.load(path)
    with engine(directory, {"weights": str(path), "show_selections": True}) as llm:
        generate(llm, PROMPTS, [greedy(4), greedy(4), greedy(4, caprese="off")])
        first, second = (selections(llm, str(i)) for i in range(2))
        assert selections(llm, "2") is None, "it ran dense"
        assert all(selections(llm, name) is None for name in ("", "9", "0-", ".", "0.*"))
        llm.llm_engine.add_request("live", {"prompt_token_ids": PROMPTS[1]}, greedy(8))
        assert selections(llm, "live") is None, "its prompt is not computed"
        for _ in range(2):
            llm.llm_engine.step()
        live = selections(llm, "live")
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        assert live == second == selections(llm, "live")
    assert first is not None
    assert second is not None
    assert first["method"] == "griffin"
    for found, prompt in ((first, PROMPTS[0]), (second, PROMPTS[1])):
        assert [row["layer"] for row in found["layers"]] == list(adapters.config.layers)
        for row in found["layers"]:
            _, z, norms = activations(directory, prompt, row["layer"])
            size = row["neurons"]
            assert size == z.shape[1]
            kept = size // 2
            core = torch.tensor([], dtype=torch.int64)
            if selection is None:
                values = (z / z.norm(dim=1, keepdim=True)).square().sum(dim=0)
            else:
                prior, z = adapters.prior[row["layer"]].double(), z * norms
                values = (z / z.norm(dim=1, keepdim=True)).square().sum(dim=0)
                values = 0.5 * values / values.sum() + 0.5 * prior
                core = prior.argsort(descending=True, stable=True)[: kept // 2]
                values[core] = -1
            tail = values.argsort(descending=True, stable=True)[: kept - len(core)]
            assert row["core"] == pytest.approx(shares(core, size))
            assert row["tail"] == pytest.approx(shares(tail, size))


def test_the_threshold_of_cats(model_dir: ModelDir) -> None:
    directory = model_dir("llama")
    with engine(directory, {"method": "cats", "density": 0.5, "show_selections": True}) as llm:
        generate(llm, PROMPTS[:1], greedy(2))
        found = selections(llm, "0")
    assert found is not None
    assert found["method"] == "cats"
    for row in found["layers"]:
        g, _, _ = activations(directory, PROMPTS[0], row["layer"])
        assert row["threshold"] == pytest.approx(float(g.abs().flatten().quantile(0.5)), rel=1e-4)


def test_a_core_that_all_requests_share(model_dir: ModelDir, tmp_path: Path) -> None:
    """There any name has it: it says nothing about a request."""
    directory = model_dir("llama")
    alone = CORE | {"core": 1.0}
    path = make_adapter(directory, tmp_path / "a.safetensors", "griffin", rank=0, selection=alone)
    prior = Adapters.load(path).prior
    with engine(directory, {"weights": str(path), "show_selections": True}) as llm:
        found = selections(llm, "any")
    assert found is not None
    for row in found["layers"]:
        core = prior[row["layer"]].argsort(descending=True, stable=True)[: row["neurons"] // 2]
        assert row["core"] == pytest.approx(shares(core, row["neurons"]))
        assert set(row["tail"]) == {0.0}


def test_nothing_is_kept_unless_it_is_shown(model_dir: ModelDir) -> None:
    with engine(model_dir("llama"), {"method": "griffin"}) as llm:
        for _ in range(2):  # workers forget the first batch when the second comes
            generate(llm, PROMPTS, greedy(2))
        assert all(selections(llm, str(i)) is None for i in range(6))
        model: Any = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
        assert model.caprese.recent.find("0") is None
