"""`caprese calibrate --allocate`: hulls, budgets, the harm by definition, and the file that comes of it."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from caprese_distill.calibrate import cli
from caprese_distill.calibrate.allocate import allocate, allocated, density_of, grid, lower_hull, unit_of
from caprese_distill.calibrate.config import CalibrateConfig
from caprese_distill.calibrate.job import calibrate
from caprese_distill.calibrate.sensitivity import measure_harms
from caprese_distill.prior import collect_priors
from caprese_distill.quality import SparseLayers, measure
from caprese_distill.selection import selectors_of
from caprese_kernels.adapters import Adapters
from caprese_kernels.config import BaseModelInfo, Method, method_of
from caprese_kernels.reference import griffin_count
from caprese_kernels.terminal import verb
from tests.support.distill import ModelDir, WriteRows, make_rows, make_samples, run_distill


def counts(method: Method, neurons: int) -> list[int]:
    return [griffin_count(method.at(i).density, neurons) for i in method.layers]


def test_the_grid_is_the_quarters_around_the_density() -> None:
    assert grid(0.5, 8960) == [2240, 3328, 4480, 5632, 6720, 7808]  # multiples of 64 next to .25, .375, ...
    assert grid(1.0, 64) == [32, 48]
    for density, neurons in product((0.1, 0.3, 0.5, 0.77), (96, 97, 4864)):
        found, unit = grid(density, neurons), unit_of(density, neurons)
        assert griffin_count(density, neurons) in found
        assert all(k % unit == 0 and 0 < k < neurons for k in found)


@pytest.mark.parametrize("neurons", [96, 97, 4864, 18944])
def test_a_density_of_each_count_keeps_it(neurons: int) -> None:
    assert all(griffin_count(density_of(k, neurons), neurons) == k for k in range(1, neurons + 1))


def test_the_hull_is_below_all_points() -> None:
    points = [(1, 8.0), (2, 7.0), (3, 3.0), (4, 2.5), (5, 0.0)]
    assert lower_hull(points) == [(1, 8.0), (3, 3.0), (5, 0.0)]
    assert lower_hull(points[:1]) == points[:1]


def test_allocation_is_the_best_for_convex_harms() -> None:
    """Against every choice of three layers, harms exact at every k."""
    harms = {i: {k: scale * (6 - k) ** 2 for k in range(1, 7)} for i, scale in ((0, 1.0), (3, 7.3), (4, 2.1))}
    for budget in range(3, 19):
        chosen = allocate(harms, budget, 1)
        assert sum(chosen.values()) == budget
        found = sum(harms[i][k] for i, k in chosen.items())
        every = (dict(zip(harms, ks, strict=True)) for ks in product(range(1, 7), repeat=3) if sum(ks) == budget)
        assert found == pytest.approx(min(sum(harms[i][k] for i, k in each.items()) for each in every))


@pytest.mark.parametrize(("density", "neurons"), [(0.5, 8960), (0.4, 96), (0.3, 97), (1.0, 96)])
def test_the_sum_of_neurons_is_the_uniform_one(density: float, neurons: int) -> None:
    draw = torch.Generator().manual_seed(neurons)
    layers = (1, 2, 5)
    harms = {
        i: {k: float(torch.rand((), generator=draw)) / k for k in grid(density, neurons)} | {neurons: 0.0}
        for i in layers
    }
    method = allocated(Method("griffin", density, layers, 0), harms, neurons)
    assert sum(counts(method, neurons)) == len(layers) * griffin_count(density, neurons)
    assert method.mean_density == pytest.approx(density, abs=1 / neurons)


def test_harm_by_definition(model_dir: ModelDir) -> None:
    """Each token's <g, e> from the gradient at the block's output and the dropped neurons' rows of W_2."""
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32).eval()
    samples, info = make_samples(1, seed=3), BaseModelInfo.from_hf(model.config, "m")
    blocks: Any = {i: model.model.layers[i].mlp for i in (0, 2)}
    method = Method("griffin", 0.5, (0, 2), 0, "weighted", 0.5, 0.5)
    priors = collect_priors(model, samples, info, method)
    found = measure_harms(model, blocks, samples, method, priors, seed=5)
    sample, neurons = samples[0], info.intermediate_size
    outputs: dict[int, torch.Tensor] = {}
    inputs: dict[int, tuple[torch.Tensor]] = {}
    handles = []
    for i, block in blocks.items():
        handles += [
            block.register_forward_hook(lambda _, __, y, i=i: outputs.__setitem__(i, y.requires_grad_())),
            block.down_proj.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args)),
        ]
    model.requires_grad_(False)
    logits = model(sample.ids.long()[None]).logits[0, sample.prompt_length :]
    ends = logits.softmax(dim=1).cumsum(dim=1)
    numbers = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(5))
    y = torch.searchsorted(ends, numbers * ends[:, -1:])
    gradients = torch.autograd.grad(logits.log_softmax(dim=1).gather(1, y).sum(), list(outputs.values()))
    for handle in handles:
        handle.remove()
    for (i, block), gradient in zip(blocks.items(), gradients, strict=True):
        assert list(found[i]) == [*grid(0.5, neurons), neurons]
        assert found[i][neurons] == 0.0
        z = inputs[i][0][0].detach()
        for k, harm in found[i].items():
            selectors = selectors_of(blocks, replace(method, density=density_of(k, neurons)), priors)
            keep = selectors[i].from_prompt(None, z[: sample.prompt_length])
            assert int(keep.sum()) == k
            e = (z[sample.prompt_length :] * ~keep) @ block.down_proj.weight.t()
            wanted = (e * gradient[0, sample.prompt_length :]).sum(dim=1).square().mean() / 2
            assert harm == pytest.approx(float(wanted), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_a_sensitive_layer_is_spared(model_dir: ModelDir, method: str) -> None:
    """The block of layer 1 writes eight times as much as the others': it keeps the most, others pay for it, and the
    next token gains on samples that took no part."""
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32).eval()
    with torch.no_grad():
        for i in (0, 2, 3):
            model.model.layers[i].mlp.down_proj.weight /= 8
    info, layers = BaseModelInfo.from_hf(model.config, "m"), (0, 1, 2, 3)
    shared = (0.5, 1.0) if method == "griffin" else (0.0, 0.0)
    chosen = Method(method, 0.5, layers, 0, "weighted", *shared)  # type: ignore[arg-type]
    blocks: Any = {i: layer.mlp for i, layer in enumerate(model.model.layers)}
    samples = make_samples(12)
    priors = collect_priors(model, samples, info, chosen)
    by_layer = allocated(chosen, measure_harms(model, blocks, samples, chosen, priors), info.intermediate_size)
    kept = counts(by_layer, info.intermediate_size)
    assert kept[1] == max(kept)
    assert kept[1] >= griffin_count(0.75, info.intermediate_size)
    assert sum(kept) == 4 * griffin_count(0.5, info.intermediate_size)
    methods = {"one": chosen, "each": by_layer}
    variants = {name: SparseLayers(selectors_of(blocks, each, priors)) for name, each in methods.items()}
    found = measure(model, blocks, make_samples(6, seed=9), variants)
    assert found["each"].kl < 0.7 * found["one"].kl


def test_the_file_and_what_distill_makes_of_it(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    data, output = write_rows(make_rows(20)), tmp_path / "a.safetensors"
    app = typer.Typer()
    app.command()(verb(cli.calibrate))
    words = [str(model_dir("llama")), "--data", str(data), "--output", str(output), "--layers", "all", "--allocate"]
    outcome = CliRunner().invoke(app, [*words, "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    config = Adapters.load(output).config
    assert config.version == "2"
    assert config.densities is not None
    neurons = config.base_model.intermediate_size
    kept = counts(method_of(config), neurons)
    assert len(set(kept)) > 1
    assert sum(kept) == 4 * (neurons // 2)
    training = json.loads(outcome.stdout)["config"]["training"]
    assert "--allocate" in training["command"]
    assert set(training["harms"]["0"]) == {str(k) for k in (*grid(0.5, neurons), neurons)}
    assert training["quality"]["selection"] != training["quality_by_density"]["0.5"]
    shown = CliRunner().invoke(app, [*words, "-q"]).stdout
    assert "the same in every layer" in shown
    assert "this file's" in shown
    made = run_distill(model_dir("llama"), data, tmp_path / "b", rank=4, stage="layer-wise", calibration=output)
    assert made.adapters.config.densities == config.densities
    assert made.quality["selection"].kl == pytest.approx(training["quality"]["selection"]["kl"], rel=1e-4)


def test_without_allocate_a_file_is_as_before(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    data = str(write_rows(make_rows(20)))
    config = CalibrateConfig(model=str(model_dir("llama")), data=data, output=tmp_path / "a.safetensors")
    assert "--allocate" not in config.command()
    made = calibrate(config).adapters.config
    assert made.densities is None
    assert made.training["quality"]["selection"] == made.training["quality_by_density"]["0.5"]
    assert "densities" not in (tmp_path / "a.safetensors").read_bytes()[:4096].decode(errors="ignore")
