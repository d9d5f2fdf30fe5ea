"""FF errors of many cases from one pass: the same sums and solutions as one case at a time, and as a plain SVD."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from caprese_bench.recovery.error_moments import Case, fit_ranks, run_cases
from caprese_distill.blocks import find_blocks
from caprese_distill.data.samples import Sample, split
from caprese_distill.layer_wise.passes import run_pass
from caprese_distill.layer_wise.solve import solve
from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError
from tests.support.distill import make_samples

CASES = [Case("top-k", 0.3), Case("griffin", 0.5), Case("griffin", 0.25), Case("cats", 0.3)]
LAYERS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def model(model_dir: Callable[[str], Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return make_samples(80)


def sums_of(model: Any, samples: list[Sample]) -> Any:
    info = BaseModelInfo.from_hf(model.config, "llama")
    return run_cases(model, find_blocks(model, info, LAYERS), samples, CASES, spectrum=True)


def test_sums_and_solutions_are_the_distillers(model: Any, samples: list[Sample]) -> None:
    found = sums_of(model, samples)
    info = BaseModelInfo.from_hf(model.config, "llama")
    for case in CASES[1:]:
        alone = run_pass(model, samples, info, Method(case.method, case.density, LAYERS, 8))  # type: ignore[arg-type]
        for layer in LAYERS:
            here = found[layer][case]
            for ours, theirs in ((here.fit, alone.fit[layer]), (here.held_out, alone.held_out[layer])):
                for name in ("xx", "xe", "ee", "yy", "rows"):
                    a, b = getattr(ours, name), getattr(theirs, name)
                    assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5 * float(b.abs().max())), name
            fitted = fit_ranks(here.fit, here.held_out, [0, 3, 8])
            one = solve(here.fit, here.held_out, 8, torch.float64)
            assert fitted[8].error / float(here.held_out.ee) == pytest.approx(one.remaining, rel=1e-6)
            assert fitted[8].error <= fitted[3].error <= fitted[0].error == float(here.held_out.ee)
            smaller = solve(here.fit, here.held_out, 3, torch.float64)
            assert fitted[3].error / float(here.held_out.ee) == pytest.approx(smaller.remaining, rel=1e-6)


def test_the_oracle_is_an_svd_of_the_residuals(model: Any, samples: list[Sample]) -> None:
    """E of layer 2, written out from its definition; the best rank-r approximation leaves the other singular values."""
    case = CASES[0]
    block = model.get_decoder().layers[2].mlp
    inputs: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    parts = []
    for sample in split(samples)[1]:
        with torch.no_grad():
            model(input_ids=sample.ids[None].long())
            x = inputs.pop()[sample.prompt_length :]
            z = block.act_fn(block.gate_proj(x)) * block.up_proj(x)
            keep = torch.zeros_like(z).scatter_(1, z.abs().topk(int(0.3 * z.shape[1])).indices, 1.0)
            parts.append(block.down_proj(z * (1 - keep)))
    handle.remove()
    values = torch.linalg.svdvals(torch.cat(parts).double()).square()
    found = sums_of(model, samples)[2][case]
    assert torch.allclose(found.spectrum(), values, rtol=1e-4, atol=1e-5 * float(values[0]))
    assert float(found.held_out.ee) == pytest.approx(float(values.sum()), rel=1e-5)


def test_nothing_finite(model: Any, samples: list[Sample]) -> None:
    weight = model.get_decoder().layers[1].mlp.down_proj.weight
    kept = weight.data[0, 0].item()
    weight.data[0, 0] = float("nan")
    try:
        with pytest.raises(CapreseError, match="activations of layer 1: expected finite values"):
            sums_of(model, samples)
    finally:
        weight.data[0, 0] = kept
