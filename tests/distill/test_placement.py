"""A model with two layers that accelerate keeps on disk: they have weights only while they compute."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from caprese_distill import checkpoint
from caprese_distill.blocks import resolve_method
from caprese_distill.end_to_end.train import Recipe, distill_end_to_end
from caprese_distill.layer_wise.closed_form import distill_layer_wise
from caprese_distill.layer_wise.moments import Moments
from caprese_distill.layer_wise.passes import run_pass
from caprese_distill.loading import load_model
from caprese_distill.placement import aligned, device_of
from caprese_distill.prior import collect_priors
from caprese_distill.quality import measure_adapters
from tests.support.distill import ModelDir, make_samples


def spread(path: Path, folder: Path) -> Any:
    parts = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.3", "model.norm", "lm_head")
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}
    return load_model(str(path), "auto", device_map, offload_folder=str(folder))


@pytest.mark.parametrize(("name", "method"), [("llama-bias", "griffin"), ("qwen2", "cats")])
def test_offloaded_layers_give_the_same_bits(model_dir: ModelDir, tmp_path: Path, name: str, method: str) -> None:
    whole, parts = load_model(str(model_dir(name)), "auto"), spread(model_dir(name), tmp_path / "disk")
    down = parts.model.layers[1].mlp.down_proj
    assert down.weight.is_meta
    with aligned(down):
        assert torch.equal(down.weight, whole.model.layers[1].mlp.down_proj.weight)
    assert down.weight.is_meta
    assert device_of(parts.model.layers[1].mlp) == torch.device("cpu")
    samples = make_samples(12)
    assert checkpoint.fingerprint(parts, samples) == checkpoint.fingerprint(whole, samples)
    info, resolved = resolve_method(whole.config, "m", method, 0.5, 8, [0, 1, 2])
    expected, found = (run_pass(model, samples, info, resolved) for model in (whole, parts))
    for i in (0, 1, 2):
        assert all(
            torch.equal(getattr(expected.fit[i], f.name), getattr(found.fit[i], f.name)) for f in fields(Moments)
        )
    initial = distill_layer_wise(whole, samples, info, resolved)
    for checkpointing in (True, False):
        recipe = Recipe(1e-3, batch=4, epochs=1, gradient_checkpointing=checkpointing)
        a, b = (distill_end_to_end(model, samples, initial, recipe) for model in (whole, parts))
        errors, others = (each.config.training["end_to_end"]["held_out_errors"] for each in (a, b))
        assert errors == others  # also of an epoch that is not kept
        assert errors[0] != errors[1]
        assert all(torch.equal(tensor, b.tensors()[key]) for key, tensor in a.tensors().items())


@pytest.mark.parametrize("core", [0.8, 1.0])
def test_offloaded_layers_select_by_score_prior_and_core(model_dir: ModelDir, tmp_path: Path, core: float) -> None:
    whole, parts = load_model(str(model_dir("qwen2")), "auto"), spread(model_dir("qwen2"), tmp_path / "disk")
    samples = make_samples(12)
    info, method = resolve_method(whole.config, "m", "griffin", 0.5, 8, [0, 1, 2])
    method = replace(method, score="weighted", prior=0.5, core=core)
    priors, found = (collect_priors(model, samples, info, method) for model in (whole, parts))
    assert all(torch.equal(priors[i], found[i]) for i in method.layers)
    a, b = (distill_layer_wise(model, samples, info, method, priors=priors) for model in (whole, parts))
    recipe = Recipe(1e-3, batch=4, epochs=1)
    for adapters in ((a, b), [distill_end_to_end(model, samples, a, recipe) for model in (whole, parts)]):
        one, two = (each.tensors() for each in adapters)
        for key, tensor in one.items():
            if core < 1:
                assert torch.equal(tensor, two[key]), key
            else:  # the whole model leaves the dropped neurons out, the other one masks them: another order of sums
                assert (two[key] - tensor).norm() < 1e-2 * tensor.norm(), key
    quality = [measure_adapters(model, a, samples[:3])["adapter"] for model in (whole, parts)]
    assert quality[0] == quality[1]
