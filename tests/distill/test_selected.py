"""Distilling against score, prior and core: the student, the moments, the file, the report, and a killed run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from caprese_distill import DistillConfig, checkpoint, prior, student
from caprese_distill.blocks import find_blocks, resolve_method
from caprese_distill.calibrate.config import CalibrateConfig
from caprese_distill.calibrate.job import calibrate
from caprese_distill.calibration import read_calibration
from caprese_distill.data.batches import BATCH_TOKENS, Batch
from caprese_distill.data.chat import ChatRenderer
from caprese_distill.data.rows import Row
from caprese_distill.data.samples import Sample, encode, split
from caprese_distill.evaluate import cli as evaluate_cli
from caprese_distill.head import Head
from caprese_distill.job import Job
from caprese_distill.layer_wise import moments
from caprese_distill.layer_wise.closed_form import distill_layer_wise
from caprese_distill.layer_wise.moments import Observer
from caprese_distill.layer_wise.passes import run_pass
from caprese_distill.layer_wise.weighted import distill_weighted
from caprese_distill.prior import collect_priors
from caprese_distill.quality import measure_adapters
from caprese_distill.selection import selectors_of
from caprese_distill.student import Student, frozen
from caprese_kernels.adapters import Adapters
from caprese_kernels.config import Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.terminal import verb
from caprese_serve.inspection import inspect
from tests.support.distill import ModelDir, WriteRows, make_rows, make_samples, run_command, run_distill
from tests.support.hf_reference import HFReference, Shared
from tests.support.models import make_model, make_tokenizer

PAPER = {"score": "paper", "prior": 0.0, "core": 0.0}
# By name: method, and the settings of its selection.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("griffin", PAPER),
    "core and tail": ("griffin", {"score": "weighted", "prior": 0.5, "core": 0.8}),
    "core alone": ("griffin", {"score": "weighted", "prior": 0.5, "core": 1.0}),
    "prior alone": ("griffin", {"score": "paper", "prior": 1.0, "core": 0.2}),
    "scaled cats": ("cats", {"score": "weighted", "prior": 0.0, "core": 0.0}),
}
each_case = pytest.mark.parametrize("name", CASES)


def load(directory: Path, name: str, rank: int = 4) -> tuple[Any, Any, Method]:
    method, selection = CASES[name]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    info, resolved = resolve_method(model.config, "m", method, 0.4, rank, [0, 2])
    return model, info, replace(resolved, **selection)


def random_pairs(method: Method) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    left = {i: torch.randn(64, 4, generator=draw) / 8 for i in method.layers}
    return left, {i: torch.randn(4, 64, generator=draw) / 2 for i in method.layers}


@each_case
@torch.no_grad()
def test_the_student_is_what_is_served(model_dir: ModelDir, name: str) -> None:
    """Log-probabilities of given tokens, against the method written out token by token on a Hugging Face model."""
    (model, info, method), samples = load(model_dir("llama"), name), make_samples(5)
    priors = collect_priors(model, samples, info, method)
    left, right = random_pairs(method)
    blocks, batch = find_blocks(model, info, method.layers), Batch(samples, False)
    with Student(model, blocks, selectors_of(blocks, method, priors), left, right) as sparse:
        dense = sparse.original(batch)
        hidden = sparse(batch)
    assert (hidden - dense).norm() > 0.05 * dense.norm()
    found = Head(model)(hidden).log_softmax(dim=1).split([s.num_rows for s in samples])
    reference = HFReference(model_dir("llama"))
    shared = Shared(method.score, method.prior, method.core, priors if method.needs_prior else {})
    for sample, rows in zip(samples, found, strict=True):
        prompt, response = sample.ids[: sample.prompt_length].tolist(), sample.ids[sample.prompt_length :].tolist()
        expected = reference.generate(
            prompt,
            len(response) + 1,
            method=method.name,
            density=method.density,
            layers=method.layers,
            left=left,
            right=right,
            forced=[*response, 7],
            shared=shared,
        )
        tokens = torch.tensor([*response[1:], 7])
        # float32 in another order, over four layers.
        torch.testing.assert_close(
            rows[torch.arange(len(rows)), tokens], torch.tensor(expected.logprobs[1:]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["llama", "llama-bias", "gemma2"])
@pytest.mark.parametrize("case", ["core alone", "prior alone"])
def test_dropped_neurons_are_left_out_exactly(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, name: str, case: str
) -> None:
    """A fixed set: moments, hidden states and gradients are those of masks over all neurons, to rounding."""
    (model, info, method), samples = load(model_dir(name), case), make_samples(6)
    priors = collect_priors(model, samples, info, method)
    left, right = random_pairs(method)
    blocks, batch = find_blocks(model, info, method.layers), Batch(samples, False)

    def run(checkpointing: bool) -> tuple[Any, Tensor, list[Tensor]]:
        sums = run_pass(model, samples, info, method, priors=priors)
        selectors = selectors_of(blocks, method, priors)
        with frozen(model, checkpointing), Student(model, blocks, selectors, left, right) as sparse:
            target = sparse.original(batch)
            hidden = sparse(batch)
            (hidden - target).square().sum().backward()
            return sums, hidden.detach(), [p.grad for p in sparse.parameters() if p.grad is not None]

    calls = []
    fast = [run(checkpointing) for checkpointing in (False, True)]
    for module in (student, moments):
        monkeypatch.setattr(module, "fixed_neurons", lambda *_: calls.append(1))  # None: masks
    slow = run(False)
    assert len(calls) == 2 * len(method.layers)
    for sums, hidden, gradients in fast:
        torch.testing.assert_close(hidden, slow[1], rtol=1e-4, atol=1e-5)
        assert len(gradients) == len(slow[2]) == 2 * len(method.layers)
        for a, b in zip(gradients, slow[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
        for i in method.layers:
            xe = slow[0].fit[i].xe
            torch.testing.assert_close(sums.fit[i].xe, xe, rtol=1e-4, atol=1e-5 * float(xe.abs().max()))
            assert float(sums.held_out[i].ee) == pytest.approx(float(slow[0].held_out[i].ee), rel=1e-5)
    assert not any("forward" in block.__dict__ for block in blocks.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@each_case
def test_priors_are_collected_only_where_the_file_must_have_them(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, name: str
) -> None:
    method, selection = CASES[name]
    data = str(write_rows(make_rows(24)))
    settings = {"model": str(model_dir("llama")), "data": data, "output": tmp_path / "a", "method": method, "rank": 4}
    estimate = Job(DistillConfig(**settings, **selection)).estimate()
    assert estimate is not None
    assert ("priors" in estimate.seconds) == (name not in ("paper", "scaled cats"))


@each_case
def test_the_command_writes_the_selection_that_it_distilled_against(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, name: str
) -> None:
    method, selection = CASES[name]
    data, output = str(write_rows(make_rows(24))), tmp_path / "new" / "a.safetensors"
    words = [str(model_dir("llama")), "--data", data, "--output", str(output), "--method", method]
    for key, value in selection.items():
        words += [f"--{key}", str(value)]
    code, shown, _ = run_command(*words, "--rank", "4", "--epochs", "1", "--learning-rate", "1e-5")
    assert code == 0
    report, adapters = inspect(str(output)), Adapters.load(output)
    assert report["file_version"] == adapters.version == ("1" if selection == PAPER else "2")
    assert {key: report[key] for key in PAPER} == selection
    assert set(adapters.left) == set(adapters.config.layers)
    assert set(adapters.prior) == (set() if selection == PAPER or method == "cats" else set(adapters.left))
    quality = adapters.config.training["quality"]
    assert set(quality) == {"paper", "selection", "adapter"}
    assert all(found["kl"] > 0 and found["tokens"] > 40 for found in quality.values())
    assert (quality["paper"] == quality["selection"]) == (name == "paper")
    assert quality["adapter"] != quality["selection"]
    assert "next token on held-out responses" in shown
    card = (output.parent / "README.md").read_text()
    assert f"score {selection['score']}, prior {selection['prior']:g}, core {selection['core']:g}" in card
    assert f"| this adapter's, with L and R | {quality['adapter']['kl']:.3f} |" in card
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []
    if name != "paper":
        return
    # The paper's selection: L and R are those of a run that knows of no prior.
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama")).eval()
    info, resolved = resolve_method(model.config, "m", "griffin", 0.5, 4)
    plain = distill_layer_wise(model, samples_of(data), info, resolved)
    run_distill(model_dir("llama"), data, tmp_path / "b", rank=4, stage="layer-wise", **selection)
    found = Adapters.load(tmp_path / "b")
    assert all(torch.equal(found.left[i], plain.left[i]) for i in resolved.layers)


def samples_of(data: str) -> list[Sample]:
    """The samples that a command with default settings makes of a file."""
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    instruction = "Please reason step by step."
    chosen = [Row(n, f"{instruction}\n{row['prompt']}", row["response"]) for n, row in enumerate(rows, 1)]
    return encode(ChatRenderer(make_tokenizer()), chosen, 512)[0]


def test_weighting_and_training_keep_the_selection(model_dir: ModelDir) -> None:
    (model, info, method), samples = load(model_dir("qwen2"), "core and tail"), make_samples(12)
    priors = collect_priors(model, split(samples)[0], info, method)
    initial = distill_layer_wise(model, samples, info, method, priors=priors)
    weighted = distill_weighted(model, samples, initial)
    for adapters in (initial, weighted):
        assert {key: getattr(adapters.config, key) for key in PAPER} == CASES["core and tail"][1]
        assert all(torch.equal(adapters.prior[i], priors[i]) for i in method.layers)
    errors = weighted.config.training["errors"]["0"]
    assert errors["error_before"] == pytest.approx(initial.config.training["errors"]["0"]["error_before"])


def test_l_and_r_never_cost_more_than_they_give(model_dir: ModelDir) -> None:
    """A random model with little data: eq. 7's held-out error is at most that of no adapter, in every layer."""
    (model, info, method), samples = load(model_dir("llama"), "core alone", rank=48), make_samples(6)
    priors = collect_priors(model, split(samples)[0], info, method)
    errors = distill_layer_wise(model, samples, info, method, priors=priors).config.training["errors"]
    assert all(found["remaining"] <= 1 for found in errors.values())


def test_a_killed_run_keeps_its_priors(
    model_dir: ModelDir,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed within the pass for them, then after it; another score makes its own."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 64)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    data, output = write_rows(make_rows(12)), tmp_path / "a.safetensors"

    def run(path: Path, **changes: Any) -> str:
        run_distill(model_dir("llama"), data, path, rank=4, stage="layer-wise", **changes)
        return " ".join(capsys.readouterr().err.split())  # lines break where paths are long

    run(tmp_path / "whole.safetensors")
    calls = []

    def killed(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        real = prior.griffin_statistic
        patch.setattr(prior, "griffin_statistic", lambda *args, **options: (killed(), real(*args, **options))[1])
        patch.setattr("caprese_distill.job.estimate_seconds", lambda *_: {})  # which runs batches, too
        with pytest.raises(KeyboardInterrupt):
            run(output)
    assert (tmp_path / ".a.safetensors.prior-resume").exists()
    with monkeypatch.context() as patch:
        patch.setattr("caprese_distill.job.estimate_seconds", lambda *_: {})
        patch.setattr(Observer, "expect", killed)
        capsys.readouterr()
        with pytest.raises(KeyboardInterrupt):
            run(output)
        assert "going on after batch 1 of the prior" in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in tmp_path.glob(".a*")} == {".a.safetensors.prior"}
    with monkeypatch.context() as patch:
        patch.setattr("caprese_distill.stages.collect_priors", killed)
        assert "priors: made before" in run(output)
    whole, parts = (Adapters.load(path).tensors() for path in (tmp_path / "whole.safetensors", output))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not list(tmp_path.glob(".a*"))


def test_a_calibrated_file_begins_a_distillation(
    model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, file = str(write_rows(make_rows(24))), tmp_path / "calibrated.safetensors"
    settings = {"density": 0.3, "core": 0.8, "layers": [1, 2]}
    model = str(model_dir("llama"))
    calibrate(CalibrateConfig(model=model, data=data, output=file, **settings))
    (tmp_path / ".a.prior").write_text("another run's")
    with monkeypatch.context() as patch:
        patch.setattr("caprese_distill.stages.collect_priors", None)  # not made again
        result = run_distill(model, data, tmp_path / "a", rank=4, stage="layer-wise", calibration=file)
    assert (tmp_path / ".a.prior.kept-1").read_text() == "another run's"
    made, given = result.adapters, Adapters.load(file)
    assert (made.config.density, made.config.core, made.config.layers) == (0.3, 0.8, [1, 2])
    assert all(torch.equal(made.prior[i], given.prior[i]) for i in (1, 2))
    words = made.config.training["command"].split()
    again = dict(zip(words[3::2], words[4::2], strict=False))
    assert again["--calibration"] == str(file)
    assert (again["--core"], again["--density"], again["--layers"]) == ("0.8", "0.3", "1,2")

    def refused(match: str, **changes: Any) -> None:
        config = DistillConfig(**({"model": model, "data": data, "calibration": file, "rank": 4} | changes))
        with pytest.raises(CapreseError, match=match) as error:
            read_calibration(config)
        assert "\n" not in str(error.value)

    refused("--core: expected 0.8, as .*; found 1.0; leave out --core or --calibration", core=1.0)
    refused("--density: expected 0.3", density=0.5)
    refused(r"--layers: expected \[1, 2\].*; found \[0, 1\]", layers="first-half")
    refused("--method: expected griffin", method="cats")
    given.prior = {}
    given.config.rank, given.config.score, given.config.prior, given.config.core = 1, "paper", 0.0, 0.0
    given.left, given.right = {i: torch.zeros(64, 1) for i in (1, 2)}, {i: torch.zeros(1, 64) for i in (1, 2)}
    given.save(tmp_path / "one.safetensors")
    refused("expected a file with priors; found none", calibration=tmp_path / "one.safetensors")
    other = str(make_model("llama", tmp_path / "m", intermediate_size=64))
    with pytest.raises(CapreseError, match=r"calibration .* was made for another model .*intermediate_size"):
        run_distill(other, data, tmp_path / "b", rank=4, calibration=file)


def test_evaluate_measures_an_adapter(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    data, model = str(write_rows(make_rows(12))), str(model_dir("llama"))
    result = run_distill(model, data, tmp_path / "a.safetensors", rank=4, stage="layer-wise")
    app = typer.Typer()
    app.command()(verb(evaluate_cli.evaluate))
    words = [str(result.adapter), "--model", model, "--data", data]
    outcome = CliRunner().invoke(app, [*words, "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)["quality"]
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    expected = measure_adapters(network, result.adapters, samples_of(data))
    for name, quality in expected.items():
        assert found[name] == {
            "kl": pytest.approx(quality.kl, rel=1e-6),
            "agreement": pytest.approx(quality.agreement),
            "tokens": quality.tokens,
        }
    shown = CliRunner().invoke(app, words).stdout
    assert "without L and R" in shown
    assert "with L and R" in shown
    assert CliRunner().invoke(app, words[:1]).exit_code == 2
    one = tmp_path / "one.jsonl"
    one.write_text(Path(data).read_text().splitlines()[0])
    alone = CliRunner().invoke(app, [*words[:3], "--data", str(one), "--json"])  # nothing is held out
    assert json.loads(alone.stdout)["quality"]["adapter"]["tokens"] == samples_of(str(one))[0].num_rows
    one.write_text(json.dumps({"prompt": "one", "response": ""}))
    with pytest.raises(CapreseError, match="expected 1 or more usable; found 0 of 1"):
        CliRunner().invoke(app, [*words[:3], "--data", str(one)], catch_exceptions=False)
    other = str(make_model("llama", tmp_path / "m", intermediate_size=64))
    with pytest.raises(CapreseError, match="was made for another model"):
        CliRunner().invoke(app, [words[0], "--model", other, "--data", data], catch_exceptions=False)
