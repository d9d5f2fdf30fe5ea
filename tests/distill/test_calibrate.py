"""`caprese calibrate`: priors by definition, the file, what it reports, and its errors."""

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from caprese_distill.calibrate import cli
from caprese_distill.calibrate.config import CalibrateConfig
from caprese_distill.calibrate.job import calibrate
from caprese_distill.prior import collect_priors
from caprese_distill.quality import SparseLayers, measure
from caprese_distill.selection import selectors_of
from caprese_kernels.adapters import Adapters
from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.terminal import verb
from tests.support.distill import ModelDir, WriteRows, make_rows, make_samples


def blocks_of(model: nn.Module) -> dict[int, nn.Module]:
    return {i: layer.mlp for i, layer in enumerate(model.model.layers)}  # type: ignore[union-attr]


@pytest.mark.parametrize("score", ["paper", "weighted"])
def test_priors_are_the_responses_statistic(model_dir: ModelDir, score: str) -> None:
    """Token by token in float64, from a pass of each sample alone."""
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32).eval()
    samples, blocks = make_samples(7), blocks_of(model)
    method = Method("griffin", 0.5, (0, 2), 0, score, 0.5, 1.0)  # type: ignore[arg-type]
    found = collect_priors(model, samples, BaseModelInfo.from_hf(model.config, "m"), method)
    seen: dict[int, list[torch.Tensor]] = {0: [], 2: []}
    handles = [
        blocks[i].down_proj.register_forward_pre_hook(lambda _, args, i=i: seen[i].append(args[0][0].double()))  # type: ignore[union-attr]
        for i in seen
    ]
    wanted = {}
    with torch.no_grad():
        for sample in samples:
            model(sample.ids.long()[None])
    for handle in handles:
        handle.remove()
    for i, passes in seen.items():
        z = torch.cat([each[sample.prompt_length :] for each, sample in zip(passes, samples, strict=True)])
        if score == "weighted":
            z = z * blocks[i].down_proj.weight.detach().double().norm(dim=0)  # type: ignore[union-attr]
        shares = (z / z.norm(dim=1, keepdim=True)).square().sum(dim=0)
        wanted[i] = shares / shares.sum()
        # float32 passes, batched here and alone there: some 1e-6 of each activation.
        torch.testing.assert_close(found[i].double(), wanted[i], rtol=1e-4, atol=1e-9)
        assert found[i].dtype == torch.float32


def test_quality_of_a_selection(model_dir: ModelDir) -> None:
    """All neurons: nothing lost. Half of them: what a pass with masked blocks gives."""
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32).eval()
    samples, blocks = make_samples(3), {0: blocks_of(model)[0]}
    priors = collect_priors(model, samples, BaseModelInfo.from_hf(model.config, "m"), Method("griffin", 0.5, (0,), 0))
    whole = selectors_of(blocks, Method("griffin", 1.0, (0,), 0), priors)
    half = selectors_of(blocks, Method("griffin", 0.5, (0,), 0, "paper", 0.0, 1.0), priors)
    found = measure(model, blocks, samples, {"whole": SparseLayers(whole), "half": SparseLayers(half)})
    assert found["whole"].kl == pytest.approx(0.0, abs=1e-6)
    assert found["whole"].agreement == 1.0
    assert found["whole"].tokens == sum(s.num_rows for s in samples)
    kl, agreed = 0.0, 0
    down = blocks[0].down_proj
    with torch.no_grad():
        for sample in samples:
            ids, rows = sample.ids.long()[None], slice(sample.prompt_length, None)
            original = model(ids).logits[0, rows].double().log_softmax(dim=-1)

            def mask(_: nn.Module, args: tuple[torch.Tensor], start: int = sample.prompt_length) -> tuple[torch.Tensor]:
                z = args[0].clone()
                z[:, start:] *= half[0].core
                return (z,)

            handle = down.register_forward_pre_hook(mask)  # type: ignore[union-attr]
            sparse = model(ids).logits[0, rows].double().log_softmax(dim=-1)
            handle.remove()
            kl += float((original.exp() * (original - sparse)).sum())
            agreed += int((original.argmax(dim=-1) == sparse.argmax(dim=-1)).sum())
    assert kl > 0.01
    assert found["half"].kl == pytest.approx(kl / found["half"].tokens, rel=1e-3)
    assert found["half"].agreement == agreed / found["half"].tokens


def test_the_command_writes_a_file_of_version_2(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    app, output = typer.Typer(), tmp_path / "new" / "a.safetensors"
    app.command()(verb(cli.calibrate))
    words = [str(model_dir("llama")), "--data", str(write_rows(make_rows(30))), "--output", str(output)]
    outcome = CliRunner().invoke(app, [*words, "--layers", "all", "--density", "0.4", "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    report = json.loads(outcome.stdout)
    with safe_open(output, framework="pt") as file:
        assert file.metadata()["format_version"] == "2"
    adapters = Adapters.load(output)
    config = adapters.config
    assert (config.rank, config.score, config.prior, config.core, config.density) == (0, "weighted", 0.5, 1.0, 0.4)
    assert set(adapters.prior) == set(config.layers) == {0, 1, 2, 3}
    assert not adapters.left
    quality = config.training["quality_by_density"]
    assert set(quality) == {"0.25", "0.4", "0.5", "0.75"}
    assert quality["0.25"]["kl"] > quality["0.75"]["kl"] > 0
    assert set(config.training["quality"]) == {"paper", "selection"}
    assert config.training["quality"]["selection"] == quality["0.4"]
    assert report["config"]["training"] == config.training
    shown = CliRunner().invoke(app, [*words, "-q"])
    assert "this file's" in shown.stdout
    assert "each prompt's own (the paper)" in shown.stdout


def test_cats_is_calibrated_without_prior_and_core(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    data = str(write_rows(make_rows(20)))
    config = CalibrateConfig(model=str(model_dir("llama")), data=data, method="cats", output=tmp_path / "a.safetensors")
    made = calibrate(config).adapters.config
    assert (made.method, made.score, made.prior, made.core) == ("cats", "weighted", 0.0, 0.0)
    with pytest.raises(CapreseError, match=r"core: expected 0 with --method cats.*; found 0\.5"):
        CalibrateConfig(model="m", data="d", method="cats", core=0.5)


def test_the_recorded_command_makes_the_same_settings() -> None:
    config = CalibrateConfig(model="m", data="d", core=0.8, layers=[0, 3], samples=7)
    words = config.command()
    assert words[:3] == ["caprese", "calibrate", "m"]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    chosen = {"--layers": "0,3", "--core": "0.8", "--prior": "0.5", "--score": "weighted", "--samples": "7"}
    assert given.items() >= chosen.items()
    assert CalibrateConfig(model="m", **{name[2:].replace("-", "_"): value for name, value in given.items()}) == config
