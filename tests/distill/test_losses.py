"""What end-to-end training minimizes, against automatic differentiation of the definition in one piece."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from caprese_distill.blocks import resolve_method
from caprese_distill.config import Loss
from caprese_distill.end_to_end.losses import backward
from caprese_distill.end_to_end.train import Recipe, distill_end_to_end
from caprese_distill.head import LOGIT_ROWS, Head
from caprese_distill.layer_wise.closed_form import distill_layer_wise
from tests.support.distill import ModelDir, make_samples
from tests.support.models import make_model

ROWS = LOGIT_ROWS + 44  # two parts, of different sizes


def definition(loss: Loss, student: torch.Tensor, original: torch.Tensor, head: Head) -> torch.Tensor:
    """Mean over the tokens, written as losses.py's docstring says it, in float64."""
    error = (student - original).square().sum(dim=1)
    p, q = (head(h).double().softmax(dim=1) for h in (original, student))
    kl = (p * (p.log() - q.log())).sum(dim=1)
    terms = {"hidden": error, "logits": kl, "both": kl + error / original.square().sum(dim=1)}
    return terms[loss].mean()


@pytest.mark.parametrize("loss", ["hidden", "logits", "both"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # without and with a cap of the logits
def test_value_and_gradient_follow_the_definition(kind: str, loss: Loss, model_dir: ModelDir) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir(kind))
    model.requires_grad_(False)
    torch.manual_seed(0)
    original, shift = 3 * torch.randn(2, ROWS, model.config.hidden_size)
    head, found, expected = Head(model), torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)
    value = backward(loss, original + found * shift, original, head, ROWS)
    wanted = definition(loss, original + expected * shift, original, head)
    wanted.backward()
    assert found.grad is not None
    assert expected.grad is not None
    assert value == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert float(found.grad) == pytest.approx(float(expected.grad), rel=1e-4)


@pytest.mark.parametrize("loss", ["logits", "both"])
def test_training_on_logits_lowers_the_divergence_held_out(loss: Loss, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model("llama", tmp_path / "m"))
    samples = make_samples(60)
    info, method = resolve_method(model.config, "m", "griffin", 0.3, 8)
    initial = distill_layer_wise(model, samples, info, method)
    for right in initial.right.values():
        right.zero_()
    trained = distill_end_to_end(model, samples, initial, Recipe(3e-3, batch=6, epochs=3, loss=loss))
    found = trained.config.training["end_to_end"]
    assert found["loss"] == loss
    assert len(found["held_out_kl"]) == 4
    assert found["held_out_kl"][-1] < found["held_out_kl"][0]


def test_the_papers_loss_measures_no_divergence(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model("llama", tmp_path / "m"))
    samples = make_samples(20)
    info, method = resolve_method(model.config, "m", "griffin", 0.3, 8)
    initial = distill_layer_wise(model, samples, info, method)
    trained = distill_end_to_end(model, samples, initial, Recipe(1e-3, batch=6, epochs=1))
    assert "held_out_kl" not in trained.config.training["end_to_end"]
