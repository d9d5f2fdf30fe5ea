"""Masks and moments against a plain loop over samples that keeps every activation."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from caprese_distill.blocks import resolve_method
from caprese_distill.data.batches import BATCH_TOKENS, Batch
from caprese_distill.data.samples import split
from caprese_distill.layer_wise.moments import Moments
from caprese_distill.layer_wise.passes import run_pass
from caprese_distill.selection import keep_mask, select, selectors_of
from tests.support.distill import ModelDir, by_hand, make_samples, mlp_inputs


def load(model_dir: ModelDir, name: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=dtype).eval()


@pytest.mark.parametrize("method", ["griffin", "cats"])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "gemma2"])
def test_moments_equal_those_of_stored_activations(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    """Padded batches, truncated model, hooks: up to float32 rounding the sums of a loop over samples."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 100)  # batches of two or three samples
    model, samples = load(model_dir, name), make_samples(11)
    info, resolved = resolve_method(model.config, name, method, density=0.4, rank=4, layers=[0, 2])
    state = run_pass(model, samples, info, resolved)
    assert state.batches > 4
    for part, chosen in zip((state.fit, state.held_out), split(samples), strict=True):
        inputs = [mlp_inputs(model, s) for s in chosen]
        for layer in (0, 2):
            mlp = model.model.layers[layer].mlp
            rows = [
                by_hand(mlp, seen[layer], s.prompt_length, method, 0.4) for seen, s in zip(inputs, chosen, strict=True)
            ]
            x, e, y = (torch.cat([r[k] for r in rows]) for k in range(3))
            found = part[layer]
            assert int(found.rows) == len(x) == sum(len(s.ids) - s.prompt_length for s in chosen)
            torch.testing.assert_close(found.xx, x.t() @ x, rtol=1e-4, atol=1e-4 * float(x.square().mean()) * len(x))
            scale = float(e.square().mean() * x.square().mean()) ** 0.5 * len(x)
            torch.testing.assert_close(found.xe, x.t() @ e, rtol=1e-4, atol=1e-4 * scale)
            assert float(found.ee) == pytest.approx(float(e.square().sum()), rel=1e-4)
            assert float(found.yy) == pytest.approx(float(y.square().sum()), rel=1e-4)


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_masks_come_from_the_samples_own_prompt(model_dir: ModelDir, method: str) -> None:
    model, samples = load(model_dir, "llama"), make_samples(4)
    mlp = model.model.layers[0].mlp
    _, resolved = resolve_method(model.config, "m", method, density=0.3, rank=4, layers=[0])
    inputs = [mlp_inputs(model, s)[0] for s in samples]
    expected = torch.cat(
        [by_hand(mlp, x, s.prompt_length, method, 0.3)[3] for x, s in zip(inputs, samples, strict=True)]
    )
    x = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=50.0)  # loud padding changes nothing
    g = mlp.act_fn(mlp.gate_proj(x))
    batch = Batch(samples, False)
    (selector,) = selectors_of({0: mlp}, resolved).values()
    found = keep_mask(selector, batch, select(selector, batch, g, g * mlp.up_proj(x)), g)
    assert torch.equal(found, expected)
    assert len({tuple(mask.tolist()) for mask in found}) > 1


def test_chunks_add_up() -> None:
    torch.manual_seed(0)
    x, e, y = torch.randn(3, 90, 16)
    whole, chunks, total = Moments.zeros(16), Moments.zeros(16), Moments.zeros(16)
    whole.add(x, e, y)
    for part in range(0, 90, 25):
        chunk = Moments.zeros(16)
        for moments in (chunk, chunks):
            moments.add(x[part : part + 25], e[part : part + 25], y[part : part + 25])
        total = total + chunk
    for moments in (chunks, total):
        assert int(moments.rows) == 90
        for key in ("xx", "xe", "ee", "yy"):
            torch.testing.assert_close(getattr(moments, key), getattr(whole, key), rtol=1e-5, atol=1e-4)
    assert torch.equal(total.xx, chunks.xx)


def test_bfloat16_moments_are_near_the_float64_ones(model_dir: ModelDir) -> None:
    model, samples = load(model_dir, "llama", torch.bfloat16), make_samples(6)
    info, resolved = resolve_method(model.config, "m", "griffin", density=0.5, rank=4, layers=[0])
    state = run_pass(model, samples, info, resolved)
    rows = [
        by_hand(model.model.layers[0].mlp, mlp_inputs(model, s)[0], s.prompt_length, "griffin", 0.5)
        for s in split(samples)[0]
    ]
    x, e = (torch.cat([r[k] for r in rows]) for k in range(2))
    assert float(state.fit[0].ee) == pytest.approx(float(e.square().sum()), rel=0.05)
    assert (state.fit[0].xe - x.t() @ e).norm() < 0.2 * (x.t() @ e).norm()  # rounding also moves a few masks


def test_the_model_is_left_as_it_was(model_dir: ModelDir) -> None:
    model, samples = load(model_dir, "llama"), make_samples(3)
    before = model(input_ids=samples[0].ids.long()[None]).logits
    info, resolved = resolve_method(model.config, "m", "cats", density=0.5, rank=4, layers=[1])
    run_pass(model, samples, info, resolved)
    assert len(model.model.layers) == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(input_ids=samples[0].ids.long()[None]).logits, before)
