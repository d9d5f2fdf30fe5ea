"""The plan: memory against what is really allocated, time by its formula; nothing is written or changed."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from caprese_distill import checkpoint, job, timing
from caprese_distill.blocks import resolve_method
from caprese_distill.data.batches import BATCH_TOKENS, make_batches, pack
from caprese_distill.end_to_end.train import RankContext, Recipe, Trainer, steps_of
from caprese_distill.layer_wise.passes import Pass, run_pass
from caprese_distill.layer_wise.weighted import run_weighted_pass
from caprese_distill.loading import load_model, load_skeleton, stored_dtype
from caprese_distill.memory import check_disk, check_memory, estimate_memory
from caprese_distill.progress import progress_bar
from caprese_distill.selection import selectors_of
from caprese_distill.stage_files import all_progress, clean_up, held_bytes
from caprese_distill.stages import remaining_work, run_stages
from caprese_distill.student import Student, frozen
from caprese_distill.timing import estimate_seconds
from caprese_distill.work import RemainingWork, Work
from caprese_kernels.adapters import Adapters
from caprese_kernels.config import Method
from caprese_kernels.errors import CapreseError
from tests.support.distill import ModelDir, WriteRows, make_rows, make_samples, run_command, run_distill
from tests.support.models import make_model

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")


def load(directory: Path, method: str = "griffin", rank: int = 8, **changes: Any) -> tuple[Any, Any, Method]:
    model = AutoModelForCausalLM.from_pretrained(directory, **changes)
    info, resolved = resolve_method(model.config, "m", method, 0.5, rank)
    return model.eval(), info, resolved


def student_of(model: Any, info: Any, method: Method) -> Student:
    shapes = ((info.hidden_size, method.rank), (method.rank, info.hidden_size))
    left, right = ({i: torch.zeros(shape) for i in method.layers} for shape in shapes)
    blocks = {i: model.model.layers[i].mlp for i in method.layers}
    return Student(model, blocks, selectors_of(blocks, method), left, right)


def allocated(work: Callable[[], object]) -> int:
    """The most bytes of tensors that `work` had alive at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    held, most = 0, 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("method", ["griffin", "cats"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_tensors(model_dir: ModelDir, tmp_path: Path, method: str, dtype: str) -> None:
    """Weights, moments, L and R, gradients, Adam and files: exact to the byte, from shapes alone."""
    model, info, resolved = load(model_dir("qwen2"), method, dtype=getattr(torch, dtype))
    config = AutoConfig.from_pretrained(model_dir("qwen2"))
    skeleton = load_skeleton("m", config, dtype)
    assert all(p.device.type == "meta" for p in skeleton.parameters())
    samples, recipe = make_samples(12), Recipe(1e-3, 4, 1)
    memory = estimate_memory(skeleton, Work(samples, info, resolved, recipe), CPU, stored_dtype(config))

    weights = sum(p.nbytes for p in model.parameters())
    assert list(memory.always.values())[1] == weights
    assert sum(memory.stages["loading"].values()) == (0 if dtype == "float32" else 2 * weights)
    state = Pass.begin(dict.fromkeys(resolved.layers, CPU), info.hidden_size)
    parts = [m for by_layer in (state.fit, state.held_out) for m in by_layer.values()]
    layers = len(resolved.layers)
    assert memory.stages["layer-wise"][f"moments of {layers} layers"] == sum(m.xx.nbytes + m.xe.nbytes for m in parts)
    with student_of(model, info, resolved) as student:
        trainer = Trainer(model, student, samples, recipe, RankContext())
        with progress_bar(None, "tok/s") as bar:
            trainer._evaluate_held_out(bar)
        trainer._step(trainer.steps[0])
        parameters = student.parameters()
        states = [t for p in parameters for key, t in trainer.optimizer.state[p].items() if key != "step"]
        assert memory.stages["end to end"]["L and R, the best epoch's, gradients, Adam"] == sum(
            t.nbytes for t in (*parameters, *trainer.best, *(p.grad for p in parameters if p.grad is not None), *states)
        )
        checkpoint.save(tmp_path / "checkpoint", *trainer.snapshot(), {})
    checkpoint.save(tmp_path / "moments", *state.snapshot(), {})
    output = tmp_path / "a"
    run_stages(model, Work(samples, info, resolved), output).save(output)
    header = 8192
    assert memory.output <= output.stat().st_size <= memory.output + header
    largest = max((tmp_path / name).stat().st_size for name in ("checkpoint", "moments"))
    assert 2 * largest <= memory.disk + 2 * header


@pytest.mark.parametrize("method", ["griffin", "cats"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_near_what_is_allocated(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    """The arithmetic of a layer's operations is not exact, but weights dominate the total."""
    model, info, resolved = load(make_model("llama", tmp_path, intermediate_size=512), method, dtype=dtype)
    samples, recipes = (
        make_samples(24, longest=120),
        [Recipe(1e-3, 8, 1, gradient_checkpointing=on) for on in (True, False)],
    )

    def parts(recipe: Recipe) -> Any:
        return estimate_memory(model, Work(samples, info, resolved, recipe), CPU, dtype).stages

    stage = parts(recipes[0])["layer-wise"]
    assert sum(stage.values()) == pytest.approx(allocated(lambda: run_pass(model, samples, info, resolved)), rel=0.25)
    initial = run_stages(model, Work(samples, info, resolved), tmp_path / "a")
    stage = estimate_memory(model, Work(samples, info, resolved, weighting=True), CPU, dtype).stages["weighted"]
    most = allocated(lambda: run_weighted_pass(model, samples, initial))
    assert sum(stage.values()) == pytest.approx(most, rel=0.25)
    for recipe in recipes:
        with frozen(model, recipe.gradient_checkpointing), student_of(model, info, resolved) as student:
            trainer = Trainer(model, student, samples, recipe, RankContext())
            trainer._step(trainer.steps[0])  # Adam's state and the gradients, which stay
            longest = max(trainer.steps, key=lambda step: max(b.num_padded for b in pack(step, CPU)))
            most = allocated(partial(trainer._step, longest))
        activations = list(parts(recipe)["end to end"].values())[2]
        print(method, dtype, recipe.gradient_checkpointing, activations, most)
        assert activations == pytest.approx(most, rel=0.25)


def test_capped_scores_count(model_dir: ModelDir) -> None:
    """Gemma 2 runs with eager attention, whose scores take memory; so does the skeleton that the estimate sees."""
    directory = model_dir("gemma2")
    model, config = load_model(str(directory), "float32"), AutoConfig.from_pretrained(directory)
    info, method = resolve_method(config, "m", "griffin", 0.5, 8)
    work = Work(make_samples(12), info, method, Recipe(1e-3, 4, 1))
    seen = [
        estimate_memory(each, work, CPU, torch.float32).stages["end to end"]
        for each in (model, load_skeleton("m", config, "float32"))
    ]
    assert seen[0] == seen[1]


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    data, before = write_rows(make_rows(22)), sorted(tmp_path.rglob("*"))
    output = tmp_path / "new" / "a.safetensors"
    words = [str(model_dir("llama")), "--data", str(data), "--output", str(output), "--rank", "8", "--batch", "4"]
    code, shown, _ = run_command(*words, "--dry-run")
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    for expected in (
        "LlamaForCausalLM",
        "4 found, 2 replaced: layers 0-1",
        "method griffin, density 0.5, rank 8",
        "2,048 parameters",
        "layer-wise (closed form), then end to end",
        "22 used, 2 of them held out; 0 skipped",
        "15 optimizer steps of 4 samples, 3 epochs",
        "moments of 2 layers",
        "activations with gradient checkpointing",
        "peak",
        "time, estimated from a few batches:",
        "original model",
        "closed form",
    ):
        assert expected in " ".join(shown.split())


def test_what_is_left_of_a_killed_run(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 64)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    (model, info, method), samples = load(model_dir("llama")), make_samples(12)
    recipe, output = Recipe(1e-3, 4, 2), tmp_path / "a"
    work = Work(samples, info, method, recipe)
    batches = make_batches(samples, CPU)

    def left() -> tuple[int, int, int, int, bool]:
        found = remaining_work(model, work, output)
        seconds = estimate_seconds(model, work, found)
        stages = {"original model": found.batches, "closed form": found.layers, "end to end": found.steps}
        assert list(seconds) == [stage for stage, work in stages.items() if work]
        assert all(0 < s < math.inf for s in seconds.values())
        return len(found.batches), len(found.layers), len(found.steps), found.evaluations, found.resumed

    save = checkpoint.save

    def dying(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dying)

    def run(times: int) -> None:
        """Each run dies after one batch, or one step."""
        for _ in range(times):
            with pytest.raises(KeyboardInterrupt):
                run_stages(model, work, output)

    steps = len(steps_of(samples[:11], recipe))
    assert left() == (len(batches), 2, steps, 3, False)
    run(2)
    assert left() == (len(batches) - 2, 2, steps, 3, True)
    run(len(batches) - 2)
    assert left() == (0, 2, steps, 3, True)
    run(1)
    assert left() == (0, 0, steps - 1, 2, True)
    run(steps // 2 - 1)  # to the end of the first of two epochs
    assert left() == (0, 0, steps // 2, 1, True)
    other = replace(work, recipe=Recipe(2e-3, 4, 2))  # starts its training again
    assert len(remaining_work(model, other, output).steps) == steps
    assert len(remaining_work(model, replace(work, samples=make_samples(11)), output).batches) > 0


def test_what_is_left_of_a_killed_weighted_run(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unweighted, weighted, end to end: none is repeated, and the result is that of an undisturbed run."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 64)
    (model, info, method), samples = load(model_dir("llama")), make_samples(12)
    recipe, output, batches = Recipe(1e-3, 4, 2), tmp_path / "a", len(make_batches(samples, CPU))
    work = Work(samples, info, method, recipe, weighting=True)
    whole = run_stages(model, work, tmp_path / "whole")
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)

    def left() -> tuple[int, int, int, int, bool]:
        found = remaining_work(model, work, output)
        seconds = estimate_seconds(model, work, found)
        stages = {
            "original model": found.batches,
            "gradients": found.weighted,
            "closed form": found.layers,
            "end to end": found.steps,
        }
        assert list(seconds) == [stage for stage, work in stages.items() if work]
        assert all(0 < s < math.inf for s in seconds.values())
        return len(found.batches), len(found.weighted), len(found.layers), len(found.steps), found.resumed

    save = checkpoint.save

    def dying(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt

    def run(times: int) -> None:
        for _ in range(times):
            with pytest.raises(KeyboardInterrupt):
                run_stages(model, work, output)

    steps = len(steps_of(samples[:11], recipe))
    assert left() == (batches, batches, 4, steps, False)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dying)
        run(1)
        assert left() == (batches - 1, batches, 4, steps, True)
        run(batches)
        assert left() == (0, batches - 1, 2, steps, True)
        run(batches)
        assert left() == (0, 0, 0, steps - 1, True)
    parts = run_stages(model, work, output)
    assert all(torch.equal(parts.left[i], whole.left[i]) for i in method.layers)
    assert parts.config.training["weighting"] == "gradient"
    assert held_bytes(all_progress(output)) > 0
    clean_up(output)
    assert held_bytes(all_progress(output)) == 0
    plain = remaining_work(model, replace(work, weighting=False), tmp_path / "whole")  # not of the weighted stages
    assert len(plain.weighted) == 0


def test_time_is_scaled_from_what_is_timed(model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which everything takes a second, the estimate is arithmetic."""

    def one_second(_: torch.device, work: Callable[[], object]) -> float:
        work()
        return 1.0

    monkeypatch.setattr(timing, "_timed", one_second)
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 100)
    (model, info, method), samples, recipe = load(model_dir("llama")), make_samples(30), Recipe(1e-3, 8, 2)
    batches, steps = make_batches(samples, CPU), steps_of(samples[:27], recipe)
    remaining = RemainingWork(batches, method.layers, steps, 3, resumed=False)
    found = estimate_seconds(model, Work(samples, info, method, recipe), remaining)

    def padded(part: Any) -> int:
        return sum(b.num_padded for b in part)

    def chosen(part: Any) -> int:
        sizes = sorted(b.num_padded for b in part)
        return sum(sizes[len(sizes) * i // 6] for i in (1, 3, 5))

    micro = [b for step in steps for b in pack(step, CPU)]
    held_out = [b for b in batches if b.held_out]
    assert found["original model"] == pytest.approx(padded(batches) / chosen(batches))
    assert found["closed form"] == 9 * 2
    assert found["end to end"] == pytest.approx(
        (6 * padded(micro) + 3 * 3 * padded(held_out)) / chosen(micro) + len(steps)
    )


def test_estimating_leaves_no_trace(model_dir: ModelDir, tmp_path: Path) -> None:
    samples, recipe = make_samples(12), Recipe(1e-3, 4, 1)
    (plain, info, method), (model, _, _) = load(model_dir("llama")), load(model_dir("llama"))
    wanted = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    work = Work(samples, info, method, recipe)
    estimate_seconds(model, work, remaining_work(model, work, tmp_path / "a"))
    assert torch.equal(random, torch.get_rng_state())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    one, two = (run_stages(m, work, tmp_path / "a") for m in (plain, model))
    assert all(torch.equal(one.left[i], two.left[i]) and torch.equal(one.right[i], two.right[i]) for i in one.left)


def test_too_little_memory_or_disk(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (model, info, method), samples = load(model_dir("llama")), make_samples(4)
    device = torch.device("cuda")
    memory = estimate_memory(model, Work(samples, info, method, Recipe(1e-3, 4, 1)), device, torch.float32)
    assert memory.host_peak >= psutil.Process().memory_info().rss * 0.9
    assert sum(memory.always.values()) == sum(p.nbytes for p in model.parameters()) < memory.peak
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory.peak, 1 << 40))
    assert check_memory(memory, device) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory.peak - 1, 1 << 40))
    with pytest.raises(CapreseError, match=r"device memory: expected .*MiB free.*--stage layer-wise"):
        check_memory(memory, device)
    check_disk(memory, tmp_path / "not" / "there" / "a", 0)

    data, loads = write_rows(make_rows(6)), []
    monkeypatch.setattr(job, "load_model_on", lambda *_: loads.append(1))
    usage = psutil.disk_usage(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(CapreseError, match=r"free disk for the adapter and its checkpoints; found 0.0 MiB"):
            run_distill(str(model_dir("llama")), data, tmp_path / "new" / "a", rank=4)
    assert not loads  # refused before the work
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl"]
    memory = estimate_memory(model, Work(samples, info, method), CPU, torch.float32)
    check_disk(memory, tmp_path / "a", 0)
    monkeypatch.setattr(psutil, "virtual_memory", _Little)
    warning = check_memory(memory, CPU)
    assert warning is not None
    assert "--max-length" in warning


class _Little:
    available = 1


def test_a_run_reports_what_it_took(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    """In a separate process, whose peak is that of this run alone."""
    output = tmp_path / "out" / "a.safetensors"
    words = [str(model_dir("llama")), "--data", str(write_rows(make_rows(12))), "--output", str(output)]
    code = f"import sys; sys.argv[1:] = {['distill', *words, '--rank', '8', '--epochs', '1']!r}\n"
    code += "from caprese_serve.cli import main; main()"
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "memory and time: estimated " in done.stdout
    assert "; was " in done.stdout
    assert "time, estimated from a few batches" in done.stderr  # before the work
    resources = Adapters.load(output).config.training["resources"]
    assert resources["estimated_seconds"] > 0
    assert resources["seconds"] > 0
    peak, estimated = resources["peak_bytes"]["host"], resources["estimated_bytes"]["host"]
    assert peak == pytest.approx(estimated, rel=0.2)
