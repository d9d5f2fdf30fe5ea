"""Data for the tests of caprese_distill, the method written out by hand, and the public call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from caprese_distill import DistillConfig, Result, cli, distill
from caprese_distill.data.samples import Sample
from caprese_kernels.terminal import verb
from tests.support.models import VOCABULARY

ModelDir = Callable[[str], Path]
WriteRows = Callable[[list[dict[str, Any]]], Path]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def words(count: int, seed: int) -> str:
    return " ".join(NUMBERS[(seed * 7 + i * i + i // 3) % 10] for i in range(count))


def make_rows(count: int, response_words: int = 20) -> list[dict[str, Any]]:
    return [{"prompt": words(5 + i % 7, i), "response": words(response_words + i % 11, i + 100)} for i in range(count)]


def make_samples(count: int, seed: int = 0, longest: int = 40) -> list[Sample]:
    """Random token ids, prompts of 3 to 12 tokens."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for line in range(1, count + 1):
        prompt = int(torch.randint(3, 13, (), generator=draw))
        length = prompt + int(torch.randint(1, longest - 12, (), generator=draw))
        samples.append(Sample(torch.randint(4, VOCABULARY, (length,), generator=draw).int(), prompt, line))
    return samples


def run_distill(model: str | Path, data: str | Path, output: Path, **settings: Any) -> Result:
    """`caprese_distill.distill`, with its remarks on stderr."""
    return distill(DistillConfig(model=str(model), data=str(data), output=output, **settings), Console(stderr=True))


def run_command(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `caprese distill` with these words, in this process."""
    app = typer.Typer()
    app.command("distill")(verb(cli.distill))
    outcome = CliRunner().invoke(app, list(words))
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.stdout, outcome.stderr


@torch.no_grad()
def mlp_inputs(model: Any, sample: Sample) -> dict[int, Tensor]:
    """The input of every layer's FF block, [T, D], of the whole model run on this sample alone."""
    seen: dict[int, Tensor] = {}
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0][0]))
        for i, layer in enumerate(model.model.layers)
    ]
    model(input_ids=sample.ids.long()[None])
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def by_hand(mlp: Any, x: Tensor, prompt: int, method: str, density: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, E, FF(x) of the generated tokens and their masks, by the paper's equations, in float64."""
    x = x.double()
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    bias = [0.0 if m.bias is None else m.bias.double() for m in (gate, up, down)]
    g = mlp.act_fn(x @ gate.weight.double().t() + bias[0])
    z = g * (x @ up.weight.double().t() + bias[1])
    neurons = z.shape[1]
    if method == "griffin":
        s = [sum(float(z[i, j] ** 2 / (z[i] ** 2).sum()) for i in range(prompt)) ** 0.5 for j in range(neurons)]
        kept = sorted(range(neurons), key=lambda j: -s[j])[: int(density * neurons)]
        keep = torch.zeros(len(x) - prompt, neurons, dtype=torch.bool)
        keep[:, kept] = True
    else:
        tau = torch.quantile(g[:prompt].abs().flatten(), 1 - density)
        keep = g[prompt:].abs() >= tau
    dense = z[prompt:] @ down.weight.double().t() + bias[2]
    sparse = (z[prompt:] * keep) @ down.weight.double().t() + bias[2]
    return x[prompt:], dense - sparse, dense, keep
