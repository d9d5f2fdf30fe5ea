"""The weighted closed form against gradients of each sample alone, taken without hooks; and resumption to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from caprese_distill import checkpoint
from caprese_distill.blocks import find_blocks, resolve_method
from caprese_distill.data.batches import BATCH_TOKENS, Batch
from caprese_distill.data.samples import Sample, split
from caprese_distill.head import Head
from caprese_distill.layer_wise.closed_form import distill_layer_wise
from caprese_distill.layer_wise.passes import run_pass
from caprese_distill.layer_wise.weighted import FLOOR, distill_weighted, run_weighted_pass
from caprese_distill.selection import selectors_of
from caprese_distill.student import Student, frozen
from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError
from caprese_kernels.reference import griffin_select, griffin_statistic
from tests.support.distill import ModelDir, WriteRows, make_rows, make_samples, run_command

LAYERS, DENSITY = [0, 2], 0.3


def load(model_dir: ModelDir, name: str) -> Any:
    """A model with a louder head: a random model's distributions are nearly flat, and gradients nearly zero."""
    model = AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10.0)
    return model


def first_stage(model: Any, samples: Any, method: str = "griffin") -> tuple[Any, Any, Adapters]:
    info, resolved = resolve_method(model.config, "m", method, DENSITY, 4, LAYERS)
    return info, resolved, distill_layer_wise(model, samples, info, resolved)


def run_alone(model: Any, sample: Sample, method: str, adapters: Adapters) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """By layer x, E and the gradient of KL(original || student), [N, D], of one sample, the blocks rewritten."""
    ids, p = sample.ids.long()[None], sample.prompt_length
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    probes = {i: torch.zeros(1, ids.shape[1], 64, requires_grad=True) for i in LAYERS}
    sparse = False

    def rewrite(i: int, mlp: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            g = mlp.act_fn(mlp.gate_proj(x))
            z = g * mlp.up_proj(x)
            keep = torch.ones_like(z, dtype=torch.bool)
            if method == "griffin":
                keep[0, p:] = griffin_select(griffin_statistic(z[0, :p]), int(DENSITY * z.shape[-1]))
            else:
                keep[0, p:] = g[0, p:].abs() >= torch.quantile(g[0, :p].abs().flatten(), 1 - DENSITY)
            if not sparse:
                seen[i] = x[0, p:], F.linear(torch.where(keep, 0, z), mlp.down_proj.weight)[0, p:]
                return mlp.down_proj(z)
            low = x @ adapters.left[i] @ adapters.right[i]
            low[0, :p] = 0
            return mlp.down_proj(torch.where(keep, z, 0)) + low + probes[i]

        return forward

    for i in LAYERS:
        mlp = model.model.layers[i].mlp
        mlp.forward = rewrite(i, mlp)
    try:
        original = model(input_ids=ids).logits[0, p:].log_softmax(-1).detach()
        sparse = True
        student = model(input_ids=ids).logits[0, p:].log_softmax(-1)
        divergence = F.kl_div(student, original, log_target=True, reduction="sum")
        found = torch.autograd.grad(divergence, list(probes.values()))
    finally:
        for i in LAYERS:
            del model.model.layers[i].mlp.forward
    return {i: (*(t.detach().double() for t in seen[i]), g[0, p:].double()) for i, g in zip(LAYERS, found, strict=True)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "method"), [("llama", "griffin"), ("qwen2", "cats"), ("gemma2", "griffin"), ("gemma2", "cats")]
)
def test_weights_are_the_gradients_of_each_sample_alone(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, name: str, method: str, checkpointing: bool
) -> None:
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 100)
    monkeypatch.setattr("caprese_distill.layer_wise.weighted.LOGIT_ROWS", 7)
    model, samples = load(model_dir, name), make_samples(20)
    _, _, initial = first_stage(model, samples, method)
    state = run_weighted_pass(model, samples, initial, gradient_checkpointing=checkpointing)
    parts = [[run_alone(model, s, method, initial) for s in part] for part in split(samples)]
    for i in LAYERS:
        mean = torch.cat([alone[i][2] for alone in parts[0]]).norm(dim=1).mean()
        for found, part in zip(state.weighted(i), parts, strict=True):
            x, e, g = (torch.cat([alone[i][k] for alone in part]) for k in range(3))
            w = (g.norm(dim=1) / mean + FLOOR)[:, None]
            assert float(w.max() / w.min()) > 2  # weights that differ, beyond FLOOR
            for sums, expected, other in ((found.xx, x.t() @ (w * x), x), (found.xe, x.t() @ (w * e), e)):
                scale = float((w * x.square()).sum() * (w * other.square()).sum()) ** 0.5 / 64
                torch.testing.assert_close(sums, expected, rtol=2e-3, atol=2e-3 * scale)
            assert float(found.ee) == pytest.approx(float((w * e.square()).sum()), rel=2e-3)
            assert int(found.rows) == len(x)


def test_every_row_alike_is_the_unweighted_pass(model_dir: ModelDir) -> None:
    """The unweighted sums are those of `run_pass`; and without a gradient they are the weighted ones."""
    model, samples = load(model_dir, "llama"), make_samples(20)
    info, method, initial = first_stage(model, samples)
    plain, state = run_pass(model, samples, info, method), run_weighted_pass(model, samples, initial)
    for i in LAYERS:
        torch.testing.assert_close(state.alike.fit[i].xe, plain.fit[i].xe)
        torch.testing.assert_close(state.alike.held_out[i].xx, plain.held_out[i].xx)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # all tokens equally likely, whatever happens
    again = distill_weighted(model, samples, initial)
    for i in LAYERS:
        assert (again.left[i] @ again.right[i] - initial.left[i] @ initial.right[i]).norm() < 1e-3 * (
            initial.left[i] @ initial.right[i]
        ).norm()


def test_what_the_adapter_records(model_dir: ModelDir) -> None:
    """Errors stay those of eq. 7, by the unweighted moments; the rest of `training` is the first stage's."""
    model, samples = load(model_dir, "llama"), make_samples(40)
    info, method, initial = first_stage(model, samples)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapters = distill_weighted(model, samples, initial)
    training, plain = adapters.config.training, run_pass(model, samples, info, method)
    assert (training["stage"], training["solver"], training["weighting"]) == ("layer-wise", "closed-form", "gradient")
    assert training["seconds"] >= initial.config.training["seconds"]
    for i in LAYERS:
        error = plain.held_out[i].error(adapters.left[i].double(), adapters.right[i].double())
        assert training["errors"][str(i)]["remaining"] == pytest.approx(error / float(plain.held_out[i].ee), rel=1e-5)
        assert not torch.equal(adapters.left[i], initial.left[i])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_logits_are_the_models_own(model_dir: ModelDir, name: str) -> None:
    model, (sample,) = AutoModelForCausalLM.from_pretrained(model_dir(name)).eval(), make_samples(1)
    info, method = resolve_method(model.config, "m", "griffin", DENSITY, 4, [0])
    blocks, zeros = find_blocks(model, info, [0]), [{0: torch.zeros(64, 4)}, {0: torch.zeros(4, 64)}]
    batch = Batch([sample], False)
    with (
        frozen(model, False),
        Student(model, blocks, selectors_of(blocks, method), *zeros) as student,
    ):
        found = Head(model)(student.original(batch))
        expected = model(input_ids=batch.ids()).logits[0, sample.prompt_length :]
    torch.testing.assert_close(found, expected)


def test_a_killed_pass_continues_to_the_same_bits(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after every checkpoint; and a checkpoint of other initial adapters is not resumed."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 80)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    model, samples, resume = load(model_dir, "qwen2"), make_samples(12), tmp_path / "r"
    _, _, initial = first_stage(model, samples)
    whole = distill_weighted(model, samples, initial)
    save, deaths = checkpoint.save, 0

    def dying(*args: Any) -> None:
        save(*args)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dying)
        while True:
            try:
                parts = distill_weighted(model, samples, initial, resume)
                break
            except RuntimeError:
                deaths += 1
    assert deaths > 3
    for i in LAYERS:
        assert torch.equal(whole.left[i], parts.left[i])
        assert torch.equal(whole.right[i], parts.right[i])
    initial.right[0] = initial.right[0] * 2
    other = distill_weighted(model, samples, initial, resume)
    assert torch.equal(other.left[2], distill_weighted(model, samples, initial).left[2])
    assert not torch.equal(other.left[2], whole.left[2])


def test_the_command_weights(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    data, output = write_rows(make_rows(22)), tmp_path / "a.safetensors"
    words = [str(model_dir("llama")), "--data", str(data), "--output", str(output), "--method", "cats", "--rank", "8"]
    code, shown, _ = run_command(*words, "--device", "cpu", "--weighting", "gradient")
    assert code == 0
    training = Adapters.load(output).config.training
    assert (training["weighting"], training["stage"]) == ("gradient", "end-to-end")
    assert "--weighting gradient" in training["command"]
    assert "closed-form, weighted by the gradient" in (tmp_path / "README.md").read_text()
    assert "closed-form, weighted by the gradient" in " ".join(shown.split())


def test_a_gradient_that_is_not_finite_raises(model_dir: ModelDir) -> None:
    model, samples = load(model_dir, "llama"), make_samples(5)
    _, _, initial = first_stage(model, samples)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 5] = float("nan")
    with pytest.raises(CapreseError, match=r"gradient at layer \d: expected finite values; found NaN or Inf, samples"):
        run_weighted_pass(model, samples, initial)
