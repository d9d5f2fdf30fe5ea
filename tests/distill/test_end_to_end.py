"""End-to-end training: what it trains, in which order, and that a killed run continues to the same bits."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from caprese_distill import checkpoint
from caprese_distill.blocks import find_blocks, resolve_method
from caprese_distill.data.batches import BATCH_TOKENS, Batch
from caprese_distill.data.samples import split
from caprese_distill.end_to_end.train import Recipe, default_learning_rate, distill_end_to_end, steps_of
from caprese_distill.layer_wise.closed_form import distill_layer_wise
from caprese_distill.schedule import linear_schedule
from caprese_distill.selection import selectors_of
from caprese_distill.student import Student, frozen
from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError
from tests.support.distill import ModelDir, WriteRows, make_rows, make_samples, run_distill
from tests.support.models import make_model

RECIPE = Recipe(1e-3, batch=6, epochs=2)


def layer_wise(model: Any, samples: Any, method: str, rank: int = 4) -> tuple[Any, Any, Adapters]:
    info, resolved = resolve_method(model.config, "m", method, 0.3, rank)
    return info, resolved, distill_layer_wise(model, samples, info, resolved)


def train(model: Any, samples: Any, recipe: Recipe = RECIPE, method: str = "griffin", **options: Any) -> Adapters:
    _, _, initial = layer_wise(model, samples, method)
    return distill_end_to_end(model, samples, initial, recipe, **options)


def test_a_linear_error_is_learnt(tmp_path: Path) -> None:
    """A gate that is constant makes the block linear, loud neurons make every prompt keep the same half: rank F/2 can
    give all of it back, and eq. 8 finds it from R = 0, touching nothing but L and R.
    """
    model = AutoModelForCausalLM.from_pretrained(make_model("llama-bias", tmp_path / "m", intermediate_size=16))
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight.zero_()
        mlp.gate_proj.bias.fill_(1.0)
        mlp.up_proj.bias.zero_()
        mlp.up_proj.weight[:8] *= 20
    before = {key: value.clone() for key, value in model.state_dict().items()}
    samples = make_samples(100)
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 8, [0])
    initial = distill_layer_wise(model, samples, info, method)
    best = distill_end_to_end(model, samples, initial, Recipe(1e-6, epochs=1))
    initial.left[0], initial.right[0] = torch.randn(64, 8) / 8, torch.zeros(8, 64)
    adapters = distill_end_to_end(model, samples, initial, Recipe(2e-2, batch=8, epochs=12))
    training = adapters.config.training
    errors = training["end_to_end"]["held_out_errors"]
    assert len(errors) == 13
    assert best.config.training["end_to_end"]["held_out_errors"][0] < 1e-4 * errors[0]  # the closed form's
    assert errors[-1] < 0.1 * errors[0]
    assert (training["stage"], training["end_to_end"]["steps"]) == ("end-to-end", 12 * 12)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_the_held_out_error_is_that_of_the_samples_held_out(model_dir: ModelDir) -> None:
    """Recomputed, one sample at a time, for the initial and the final adapters."""
    model, samples = AutoModelForCausalLM.from_pretrained(model_dir("llama")), make_samples(40)
    info, method, initial = layer_wise(model, samples, "griffin")
    final = distill_end_to_end(model, samples, initial, RECIPE)
    _, held_out = split(samples)
    errors = []
    for adapters in (initial, final):
        blocks = find_blocks(model, info, method.layers)
        with (
            torch.no_grad(),
            Student(model, blocks, selectors_of(blocks, method), adapters.left, adapters.right) as student,
        ):
            pairs = [(student.original(b), student(b)) for b in (Batch([s], True) for s in held_out)]
        lost = sum(float((a - b).square().sum()) for a, b in pairs)
        errors.append(lost / sum(float(a.square().sum()) for a, _ in pairs))
    recorded = final.config.training["end_to_end"]["held_out_errors"]
    assert [recorded[0], recorded[-1]] == pytest.approx(errors, rel=1e-4)


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_the_student_without_loss_is_the_original(model_dir: ModelDir, method: str) -> None:
    """At density 1 with zero adapters nothing is dropped; with an adapter only generated tokens differ."""
    model, samples = AutoModelForCausalLM.from_pretrained(model_dir("qwen2")).eval(), make_samples(5)
    info, resolved = resolve_method(model.config, "m", method, 1.0, 4, "all")
    zeros = {i: torch.zeros(64, 4) for i in resolved.layers}
    blocks = find_blocks(model, info, resolved.layers)
    batch = Batch(samples, False)
    with (
        torch.no_grad(),
        Student(model, blocks, selectors_of(blocks, resolved), zeros, {i: t.t() for i, t in zeros.items()}) as student,
    ):
        assert torch.equal(student.original(batch), student(batch))
        plain = model.model(input_ids=batch.ids(), use_cache=False).last_hidden_state
        for p in student.parameters():
            torch.nn.init.normal_(p)
        changed = model.model(input_ids=batch.ids(), use_cache=False).last_hidden_state
    real = torch.zeros(plain.shape[:2], dtype=torch.bool)
    real.view(-1)[batch.rows()] = True
    prompt = torch.stack([torch.arange(plain.shape[1]) < s.prompt_length for s in samples])
    assert torch.equal(plain[prompt], changed[prompt])
    assert (plain[real] != changed[real]).any(dim=-1).all()


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_gradients_are_those_of_the_method_written_out(model_dir: ModelDir, method: str) -> None:
    """A sample at a time, with checkpointing and without."""
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama")).requires_grad_(False)
    samples = make_samples(4)
    info, resolved = resolve_method(model.config, "m", method, 0.5, 3, [0, 2])
    draw = torch.Generator().manual_seed(1)
    left = {i: torch.randn(64, 3, generator=draw) / 8 for i in resolved.layers}
    right = {i: torch.randn(3, 64, generator=draw) / 8 for i in resolved.layers}
    found = []
    for checkpointing in (False, True):
        blocks, batch = find_blocks(model, info, resolved.layers), Batch(samples, False)
        with (
            frozen(model, checkpointing),
            Student(model, blocks, selectors_of(blocks, resolved), left, right) as student,
        ):
            target = student.original(batch)
            (student(batch) - target).square().sum().backward()
            found.append([p.grad for p in student.parameters()])

    parameters = [p.clone().requires_grad_() for i in resolved.layers for p in (left[i], right[i])]
    for sample in samples:
        model.eval()
        target = model.model(input_ids=sample.ids[None].long()).last_hidden_state
        with pytest.MonkeyPatch.context() as patch:
            for n, i in enumerate(resolved.layers):
                low_rank = parameters[2 * n], parameters[2 * n + 1]
                forward = written_out(model.model.layers[i].mlp, sample.prompt_length, method, *low_rank)
                patch.setattr(model.model.layers[i].mlp, "forward", forward)
            hidden = model.model(input_ids=sample.ids[None].long()).last_hidden_state
        (hidden - target)[:, sample.prompt_length :].square().sum().backward()
    for p, plain, checkpointed in zip(parameters, *found, strict=True):
        assert p.grad is not None
        scale = float(p.grad.abs().max())
        # float32 through four layers, batched and not: 1e-5 of the largest entry was seen, a wrong mask gives 0.1
        torch.testing.assert_close(plain, p.grad, rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(checkpointed, plain)


def written_out(
    mlp: Any, prompt: int, method: str, left: torch.Tensor, right: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The FF block of one request [1, T, D] at density 0.5: prompt tokens full, the rest sparse, plus x L R."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        g = mlp.act_fn(mlp.gate_proj(x))
        z = g * mlp.up_proj(x)
        if method == "griffin":
            statistic = (z[0, :prompt] / z[0, :prompt].norm(dim=-1, keepdim=True)).square().sum(dim=0)
            chosen = statistic.topk(z.shape[-1] // 2).indices
            keep = torch.zeros_like(z[0, prompt:], dtype=torch.bool).index_fill(1, chosen, True)
        else:
            keep = g[0, prompt:].abs() >= torch.quantile(g[0, :prompt].abs().flatten(), 0.5)
        sparse = mlp.down_proj(torch.where(keep, z[0, prompt:], 0)) + x[0, prompt:] @ left @ right
        return torch.cat([mlp.down_proj(z[0, :prompt]), sparse])[None]

    return forward


def test_passes_of_any_size_take_the_same_step(model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's gradient is that of the mean over all its generated tokens, however they are cut."""
    model, samples = AutoModelForCausalLM.from_pretrained(model_dir("llama")), make_samples(24)
    found = []
    for tokens in (40, 10_000):
        monkeypatch.setitem(BATCH_TOKENS, "cpu", tokens)
        _, method = resolve_method(model.config, "m", "griffin", 0.3, 4)
        torch.manual_seed(0)
        adapters = {i: torch.randn(64, 4) / 8 for i in method.layers}
        initial = layer_wise(model, samples, "griffin")[2]
        initial.left, initial.right = adapters, {i: t.t().contiguous() for i, t in adapters.items()}
        found.append(distill_end_to_end(model, samples, initial, RECIPE))
    for i in found[0].left:
        # Adam divides by the gradient's size: entries near zero turn rounding into up to a step of 1e-3
        assert (found[0].left[i] - found[1].left[i]).abs().max() < 2e-4
    assert (found[0].left[0] - adapters[0]).abs().max() > 2e-3


def test_the_order_of_samples() -> None:
    samples = make_samples(50)
    steps = steps_of(samples, Recipe(1e-3, batch=8, epochs=2, seed=3))
    assert [len(part) for part in steps].count(2) == 2  # 50 = 6 * 8 + 2, in each epoch
    for epoch in (steps[:7], steps[7:]):
        assert sorted(s.line for part in epoch for s in part) == list(range(1, 51))
    lines = [[s.line for s in part] for part in steps]
    assert lines[:7] != lines[7:]
    assert lines == [[s.line for s in part] for part in steps_of(samples, Recipe(1e-3, batch=8, epochs=2, seed=3))]
    assert lines != [[s.line for s in part] for part in steps_of(samples, Recipe(1e-3, batch=8, epochs=2, seed=4))]


def test_the_schedule() -> None:
    """Table 6: linear, 2% warm-up. 100 steps: two up, then down to what reaches zero after the last."""
    assert [linear_schedule(step, 100, 0.02) for step in (0, 1, 2, 51, 99)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.5, 1 / 98]
    )
    assert linear_schedule(0, 1, 0.02) == 1.0
    assert [default_learning_rate(d) for d in (896, 2048, 8192, 16384)] == pytest.approx([2e-4, 2e-4, 4e-6, 4e-6])
    assert 4e-6 < default_learning_rate(5120) < default_learning_rate(4096) < 2e-4


def test_resumed_to_the_bit_from_any_step(model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = AutoModelForCausalLM.from_pretrained(model_dir("llama")), make_samples(20)
    whole = train(model, samples)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    save, resume = checkpoint.save, tmp_path / "r"

    def dying(*args: Any) -> None:
        save(*args)
        raise RuntimeError("killed")

    monkeypatch.setattr(checkpoint, "save", dying)
    deaths = 0
    while True:
        try:
            parts = train(model, samples, resume=resume)
            break
        except RuntimeError:
            deaths += 1
    assert deaths == 6  # 18 samples in steps of 6, twice
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, parts.tensors()[name])
    key = "held_out_errors"
    assert whole.config.training["end_to_end"][key] == parts.config.training["end_to_end"][key]


@pytest.mark.parametrize("loss", ["hidden", "logits"])
def test_the_best_epoch_is_kept(model_dir: ModelDir, loss: str) -> None:
    """Steps that are far too large leave the layer-wise L and R; good ones are followed to the last epoch."""
    model, samples = AutoModelForCausalLM.from_pretrained(model_dir("llama")), make_samples(40)
    _, _, initial = layer_wise(model, samples, "griffin")
    worse = distill_end_to_end(model, samples, initial, Recipe(10.0, batch=6, epochs=2, loss=loss))
    found = worse.config.training["end_to_end"]
    measured = found.get("held_out_kl", found["held_out_errors"])
    assert min(measured[1:]) > measured[0]
    assert found["kept_epoch"] == 0
    assert all(torch.equal(tensor, initial.tensors()[name]) for name, tensor in worse.tensors().items())
    for right in initial.right.values():  # there is something left to learn
        right.zero_()
    better = distill_end_to_end(model, samples, initial, Recipe(1e-2, batch=6, epochs=3, loss=loss))
    found = better.config.training["end_to_end"]
    measured = found.get("held_out_kl", found["held_out_errors"])
    assert found["kept_epoch"] == measured.index(min(measured)) > 0


def test_a_checkpoint_of_other_settings_is_ignored(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    model, samples = AutoModelForCausalLM.from_pretrained(model_dir("llama")), make_samples(20)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    train(model, samples, resume=tmp_path / "r")
    other = Recipe(2e-3, batch=6, epochs=2)
    train(model, samples, other, resume=tmp_path / "r", console=Console(stderr=True))
    assert "run with other learning_rate; starting anew" in " ".join(capsys.readouterr().err.split())


def test_a_loss_that_is_no_number_is_refused(model_dir: ModelDir) -> None:
    model, samples = AutoModelForCausalLM.from_pretrained(model_dir("llama")), make_samples(20)
    _, _, initial = layer_wise(model, samples, "griffin")
    initial.left[0][0, 0] = 3e38
    with pytest.raises(CapreseError, match=r"end-to-end loss: expected a finite number; found (nan|inf) in step 1"):
        distill_end_to_end(model, samples, initial, RECIPE)


def test_kill_and_run_again(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    """kill -9 in the end-to-end stage: the same command continues there, and writes the bits of an undisturbed run."""
    data, model = write_rows(make_rows(120)), str(model_dir("llama"))
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from caprese_distill import checkpoint; checkpoint.CHECKPOINT_SECONDS = 0.0\n"
        "from caprese_distill.end_to_end.train import Trainer; import time\n"
        "step = Trainer._step; Trainer._step = lambda *args: (time.sleep(0.05), step(*args))[1]\n"
        "from caprese_serve.cli import main; main()"
    )
    options = ["--rank", "4", "--epochs", "5", "--batch", "8", "--learning-rate", "1e-3", "--device", "cpu"]

    def command(output: Path) -> list[str]:
        return [sys.executable, "-c", code, "distill", model, "--data", str(data), "--output", str(output), *options]

    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    subprocess.run(command(whole), check=True, capture_output=True, timeout=120)
    resume = checkpoint.resume_path(parts)
    process = subprocess.Popen(command(parts), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (resume.exists() and "step" in str(checkpoint.load(resume, {}))) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not parts.exists()
    printed = subprocess.run(command(parts), check=True, capture_output=True, timeout=120, text=True).stderr
    assert "layer-wise stage: done before" in " ".join(printed.split())
    assert "going on after step" in " ".join(printed.split())
    first, second = load_file(whole), load_file(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(tmp_path.glob(".*"))


def test_tensorboard(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    run_distill(
        str(model_dir("llama")), write_rows(make_rows(20)), tmp_path / "a.safetensors", rank=4, epochs=2, batch=6,
        tensorboard=logs,
    )  # fmt: skip
    events = EventAccumulator(str(logs))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 7))
    assert [e.step for e in events.Scalars("held-out error")] == [0, 3, 6]
    assert events.Scalars("learning rate")[0].value == pytest.approx(2e-4)
