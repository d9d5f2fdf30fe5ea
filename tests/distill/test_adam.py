"""Adam on eq. 7 against a plain loop over stored activations, against the closed form, and against being killed."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from caprese_distill import checkpoint, cli, stages
from caprese_distill.blocks import resolve_method
from caprese_distill.data.batches import BATCH_TOKENS
from caprese_distill.data.samples import split
from caprese_distill.end_to_end.train import Recipe
from caprese_distill.layer_wise.adam import AdamSettings, Descent, LowRank
from caprese_distill.layer_wise.closed_form import descend, distill_layer_wise
from caprese_distill.layer_wise.moments import Moments, Observer
from caprese_distill.layer_wise.passes import run_pass
from caprese_distill.layer_wise.solve import reduced_rank, solve
from caprese_distill.schedule import linear_schedule
from caprese_distill.work import Work
from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError
from tests.support.distill import ModelDir, WriteRows, by_hand, make_rows, make_samples, mlp_inputs

CPU = torch.device("cpu")


@pytest.fixture
def model(model_dir: ModelDir) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir("llama")).eval()


def pairs(state: Descent) -> dict[int, tuple[Tensor, Tensor]]:
    return {i: (layer.left.detach(), layer.right.detach()) for i, layer in state.layers.items()}


def same(a: Descent, b: Descent) -> bool:
    """Whether all is equal to the bit, except times."""
    (found, progress), (expected, other) = a.snapshot(), b.snapshot()
    counts = all(progress[key] == other[key] for key in ("step", "batches", "tokens"))
    return found.keys() == expected.keys() and counts and all(torch.equal(found[k], expected[k]) for k in found)


def test_the_gradient_is_that_of_equation_7() -> None:
    """dL = 2 X'(X L R - E) R' and dR = 2 (X L)'(X L R - E), added over two groups of rows, in float64."""
    torch.manual_seed(0)
    x, e = torch.randn(2, 90, 12, dtype=torch.float64)
    layer = LowRank(12, 3, torch.Generator().manual_seed(0))
    left, right = layer.left.detach().double(), torch.randn(3, 12, dtype=torch.float64)
    layer.left, layer.right = torch.nn.Parameter(left), torch.nn.Parameter(right)
    for part in (slice(0, 40), slice(40, 90)):
        layer.add(x[part], e[part], e[part])
    residual = x @ left @ right - e
    assert layer.left.grad is not None
    assert layer.right.grad is not None
    torch.testing.assert_close(layer.left.grad, 2 * x.t() @ residual @ right.t(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.right.grad, 2 * (x @ left).t() @ residual, rtol=1e-12, atol=1e-12)
    assert float(layer.after) == pytest.approx(float(residual.square().sum()), rel=1e-12)
    assert float(layer.before) == pytest.approx(float(e.square().sum()), rel=1e-12)


def test_the_schedule() -> None:
    """The rate rises for 2% of 100 steps, then falls linearly to zero; with few steps, each has a rate above zero."""
    settings = AdamSettings()
    assert (settings.lr, settings.batch, settings.epochs, settings.warmup) == (1e-3, 128, 20, 0.02)  # Table 6
    rates = [linear_schedule(step, 100, settings.warmup) for step in range(100)]
    assert rates[:4] == [0.5, 1.0, 1.0, 97 / 98]
    assert rates[51] == 0.5
    assert rates[-1] == 1 / 98
    assert [linear_schedule(step, 3, settings.warmup) for step in range(3)] == [1.0, 1.0, 0.5]
    assert linear_schedule(0, 1, settings.warmup) == 1.0
    assert [linear_schedule(step, 6, 0.5) for step in range(6)] == [1 / 3, 2 / 3, 1.0, 1.0, 2 / 3, 1 / 3]


def test_l_is_random_and_r_is_zero() -> None:
    state = Descent([0, 3], 400, 50, 10, AdamSettings(), CPU)
    for left, right in pairs(state).values():
        assert left.dtype == right.dtype == torch.float32
        assert float(left.std()) == pytest.approx(400**-0.5, rel=0.03)
        assert not right.any()
    first, second = (left for left, _ in pairs(state).values())
    assert not torch.equal(first, second)
    assert torch.equal(second, pairs(Descent([3], 400, 50, 10, AdamSettings(), CPU))[3][0])
    assert not torch.equal(second, pairs(Descent([3], 400, 50, 10, AdamSettings(seed=1), CPU))[3][0])


def test_an_epoch_takes_every_sample_once() -> None:
    state = Descent([0], 4, 2, 11, AdamSettings(batch=4, epochs=2), CPU)
    assert state.steps == 6
    epochs = []
    for first in (0, 3):
        drawn = []
        for state.step in range(first, first + 3):
            drawn.append(state.draw())
        assert [len(d) for d in drawn] == [4, 4, 3]
        epochs.append([i for step in drawn for i in step])
        assert sorted(epochs[-1]) == list(range(11))
    assert epochs[0] != epochs[1] != list(range(11))


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_equals_a_loop_over_stored_activations(model: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Eq. 7 is the mean over the response tokens of a step: here of 7 samples, then of 3, in several batches."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 100)
    samples, settings = make_samples(11), AdamSettings(epochs=3, batch=7, lr=1e-2)
    info, resolved = resolve_method(model.config, "m", method, density=0.4, rank=4, layers=[0, 2])
    state = descend(model, samples, info, resolved, settings)
    start = Descent([0, 2], info.hidden_size, 4, 10, settings, CPU)
    fit = split(samples)[0]
    for layer in (0, 2):
        rows = [
            by_hand(model.model.layers[layer].mlp, mlp_inputs(model, s)[layer], s.prompt_length, method, 0.4)
            for s in fit
        ]
        left, right = (t.double().requires_grad_() for t in pairs(start)[layer])
        optimizer = torch.optim.Adam([left, right])
        for start.step, share in enumerate((1.0, 1.0, 0.8, 0.6, 0.4, 0.2)):
            optimizer.param_groups[0]["lr"] = 1e-2 * share
            optimizer.zero_grad()
            x, e = (torch.cat([rows[i][k] for i in start.draw()]) for k in range(2))
            (e - x @ left @ right).square().sum(dim=1).mean().backward()
            optimizer.step()
        for found, expected in zip(pairs(state)[layer], (left, right), strict=True):
            torch.testing.assert_close(found, expected.detach().float(), rtol=0, atol=1e-6)  # steps are of 1e-2


def test_the_first_loss_is_that_of_no_adapter(model: Any) -> None:
    samples = make_samples(12)
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 4)
    moments, seen = run_pass(model, samples, info, method), []
    update = Descent.update

    def watch(self: Descent, rows: int) -> float:
        seen.append((rows, {i: (float(layer.after), float(layer.before)) for i, layer in self.layers.items()}))
        seen.append(update(self, rows))
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Descent, "update", watch)
        descend(model, samples, info, method, AdamSettings(epochs=2))
    (rows, sums), remaining, _, later = seen
    assert remaining == 1.0 > later
    for i, (after, before) in sums.items():
        assert rows == int(moments.fit[i].rows)
        assert after == before == pytest.approx(float(moments.fit[i].ee), rel=1e-5)


def test_nears_the_closed_form_and_never_passes_it(model: Any) -> None:
    """Without a ridge the closed form is the optimum on the samples fitted; Adam's many steps end within 5% of it."""
    samples = make_samples(40)
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 8)
    moments = run_pass(model, samples, info, method)
    settings = AdamSettings(lr=1e-2, batch=12, epochs=60)
    found = descend(model, samples, info, method, settings).solutions(torch.float32)
    for i in method.layers:
        optimum = reduced_rank(moments.fit[i], 8, 0.0)
        assert optimum is not None
        least = moments.fit[i].error(*optimum) / float(moments.fit[i].ee)
        assert least < 0.9
        assert least * (1 - 1e-5) < found[i].remaining_fit < 1.05 * least
        assert found[i].remaining < 1.1 * solve(moments.fit[i], moments.held_out[i], 8, torch.float32).remaining


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_adapters_stored(model_dir: ModelDir, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen2"), dtype=dtype)
    samples = make_samples(20)
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 8)
    settings = AdamSettings(lr=1e-2, batch=9, epochs=3)
    adapters = distill_layer_wise(model, samples, info, method, adam=settings)
    assert adapters.dtype == dtype
    training = adapters.config.training
    assert (training["solver"], training["samples"], training["samples_held_out"]) == ("adam", 20, 2)
    assert training["adam"] == {"lr": 1e-2, "batch": 9, "epochs": 3, "warmup": 0.02, "seed": 0}
    assert training["tokens"] == sum(s.num_rows for s in samples)
    assert 0 <= training["seconds_training"] <= training["seconds"]
    moments = run_pass(model, samples, info, method)
    for i in method.layers:
        errors = training["errors"][str(i)]
        assert errors["ridge"] is None

        def remaining(sums: Moments, layer: int = i) -> float:
            return sums.error(adapters.left[layer].double(), adapters.right[layer].double()) / float(sums.ee)

        assert errors["remaining"] == pytest.approx(remaining(moments.held_out[i]), rel=1e-5)
        assert errors["remaining_fit"] == pytest.approx(remaining(moments.fit[i]), rel=1e-5)
        before = float(moments.held_out[i].ee / moments.held_out[i].yy)
        assert errors["error_before"] == pytest.approx(before, rel=1e-5)
        assert errors["error_after"] == pytest.approx(errors["remaining"] * before, rel=1e-5)
        assert errors["remaining"] < 1


def test_batches_within_a_step_do_not_matter(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = make_samples(20)
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 4)
    found = []
    for tokens in (1, 64, 4096):  # one sample, a few, all
        monkeypatch.setitem(BATCH_TOKENS, "cpu", tokens)
        found.append(descend(model, samples, info, method, AdamSettings(batch=8, epochs=4, lr=1e-2)))
    for other in found[1:]:
        for i in method.layers:
            for a, b in zip(pairs(found[0])[i], pairs(other)[i], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # steps are of 1e-2
            torch.testing.assert_close(other.sums["held_out"][i], found[0].sums["held_out"][i], rtol=1e-5, atol=0)


def test_layers_are_independent(model: Any) -> None:
    samples, settings = make_samples(12), AdamSettings(batch=4, epochs=2)
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 4, layers=[0, 1, 2])
    _, alone = resolve_method(model.config, "m", "griffin", 0.5, 4, layers=[1])
    together = pairs(descend(model, samples, info, method, settings))[1]
    for a, b in zip(together, pairs(descend(model, samples, info, alone, settings))[1], strict=True):
        assert torch.equal(a, b)


def test_a_killed_run_continues_to_the_same_bits(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after every checkpoint, and in the middle of a step and of the errors' pass."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 64)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    samples, settings = make_samples(14), AdamSettings(batch=5, epochs=3)
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 4)
    whole = descend(model, samples, info, method, settings)
    save, expect, calls = checkpoint.save, Observer.expect, 0

    def dying(*args: Any) -> None:
        save(*args)
        raise RuntimeError("killed")

    def interrupted(self: Observer, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise RuntimeError("killed")
        expect(self, *args)

    for name, where, what in (("dying", checkpoint, "save"), ("interrupted", Observer, "expect")):
        resume, deaths = tmp_path / name, 0
        with monkeypatch.context() as patch:
            patch.setattr(where, what, dying if name == "dying" else interrupted)
            while True:
                try:
                    parts = descend(model, samples, info, method, settings, resume)
                    break
                except RuntimeError:
                    deaths += 1
        assert deaths == whole.steps + whole.batches if name == "dying" else deaths > 3
        assert same(parts, whole)
        assert parts.seconds >= parts.seconds_training > 0


def test_the_checkpoint_of_another_run_is_ignored(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    samples, settings, console = make_samples(8), AdamSettings(batch=4, epochs=1), Console(width=200)
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 4)
    resume = tmp_path / "r"

    def printed() -> str:
        return capsys.readouterr().out.split(str(resume), 1)[1]

    descend(model, samples, info, method, settings, resume)
    descend(model, samples, info, method, settings, resume, console)
    assert "going on after step" in printed()
    descend(model, samples, info, method, replace(settings, lr=1e-2), resume, console)
    assert "it belongs to a run with other Adam settings; starting anew" in printed()
    descend(model, samples, info, replace(method, rank=3), replace(settings, lr=1e-2), resume, console)
    assert "it belongs to a run with other rank; starting anew" in printed()
    run_pass(model, samples, info, method, resume, console)
    assert "it belongs to a run with other solver; starting anew" in printed()
    descend(model, samples, info, method, settings, resume, console)  # the first, which was kept
    assert "going on after step" in printed()


def test_divergence_names_the_layer_and_the_rate(model: Any) -> None:
    samples = make_samples(8)
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 4)
    settings = AdamSettings(lr=1e30, batch=4, epochs=2)
    with pytest.raises(CapreseError, match=r"Adam, layer 0: expected a finite loss; found NaN or Inf at step 1 of 4"):
        descend(model, samples, info, method, settings)
    with pytest.raises(CapreseError, match=r"NaN or Inf at step 1 of 1; use a learning rate below 1e\+30"):
        distill_layer_wise(model, samples, info, method, adam=replace(settings, batch=8, epochs=1))


def test_non_finite_activations_are_refused(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = math.inf
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 4)
    with pytest.raises(CapreseError, match=r"activations of layer 1: expected finite values; found NaN or Inf.*line"):
        descend(model, make_samples(5), info, method, AdamSettings())


def test_density_one_gives_zero_adapters(model: Any) -> None:
    info, method = resolve_method(model.config, "m", "griffin", 1.0, 4)
    adapters = distill_layer_wise(model, make_samples(5), info, method, adam=AdamSettings(epochs=2))
    assert not any(t.any() for t in adapters.tensors().values())


def test_the_layer_wise_stage_of_another_solver_is_not_reused(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer-wise adapters that a killed end-to-end run left belong to one solver and its settings."""
    monkeypatch.setattr(stages, "distill_end_to_end", lambda *args: args[2])
    samples, settings = make_samples(8), AdamSettings(epochs=1)
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 4)
    solvers, made = (None, settings, settings, replace(settings, epochs=2), None), []
    make = stages.distill_layer_wise

    def watch(*args: Any) -> Adapters:
        made.append(args[6])
        return make(*args)

    monkeypatch.setattr(stages, "distill_layer_wise", watch)
    for adam in solvers:
        found = stages.run_stages(model, Work(samples, info, method, Recipe(1e-4), adam), tmp_path / "a")
        assert found.config.training["solver"] == ("adam" if adam else "closed-form")
    assert made == [None, settings, replace(settings, epochs=2)]  # the last run takes back what the first left


def test_the_command(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    app, output = typer.Typer(), tmp_path / "out" / "a.safetensors"
    app.command("distill")(cli.distill)
    words = [str(model_dir("llama")), "--data", str(write_rows(make_rows(22))), "--output", str(output), "--rank", "8"]
    words += ["--stage", "layer-wise", "--solver", "adam", "--layer-wise-epochs", "3", "--layer-wise-batch", "7"]
    result = CliRunner().invoke(app, [*words, "--layer-wise-learning-rate", "0.01", "--seed", "3", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "layer-wise by adam" in " ".join(result.output.split())
    training = Adapters.load(output).config.training
    assert training["adam"] == {"lr": 0.01, "batch": 7, "epochs": 3, "warmup": 0.02, "seed": 3}
    assert "--layer-wise-learning-rate 0.01 --layer-wise-batch 7 --layer-wise-epochs 3" in training["command"]
    assert all(0 < errors["remaining"] < 1 for errors in training["errors"].values())
    assert sorted(p.name for p in output.parent.iterdir()) == ["README.md", "a.safetensors"]
