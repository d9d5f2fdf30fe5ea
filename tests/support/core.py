"""Selections with a core, computed apart from the engine and its kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from caprese_kernels.adapters import Adapters
from tests.support.equality import Case


def mass_outside(case: Case, prompts: list[list[int]], layer: int, tp: int = 1) -> float:
    """The mean share of a prompt token's weighted activations outside of the core, by transformers' own model.

    Each of `tp` ranks has the core of its own neurons.
    """
    assert case.adapter is not None
    adapters = Adapters.load(case.adapter)
    model = AutoModelForCausalLM.from_pretrained(case.model_dir, dtype=torch.float32)
    block, config = model.get_decoder().layers[layer].mlp, adapters.config
    parts = adapters.prior[layer].view(tp, -1)
    count = int(config.core * int(config.density * parts.shape[1]))
    core = torch.zeros(parts.shape, dtype=torch.bool)
    core.scatter_(1, parts.argsort(dim=1, descending=True, stable=True)[:, :count], True)
    shares: list[Tensor] = []

    def observe(module: Any, inputs: tuple[Tensor]) -> None:
        mass = (inputs[0][0].double() * module.weight.double().norm(dim=0)).square()
        shares.extend(mass[:, ~core.flatten()].sum(dim=1) / mass.sum(dim=1))

    with torch.inference_mode(), block.down_proj.register_forward_pre_hook(observe):
        for prompt in prompts:
            model(torch.tensor([prompt]))
    return float(torch.stack(shares).mean())
