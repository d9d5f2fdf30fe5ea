"""The LoRA baseline (paper, section 3.5, eq. 11, and appendix C): as many parameters, on the masked FF weights.

    FF~(x) = (act(x (W~_g + A_g B_g)) * (x (W~_1 + A_1 B_1))) (W~_2 + A_2 B_2)

W~ are the weights with the columns of W_g, W_1 and rows of W_2 that belong to dropped neurons set to zero; LoRA's own
products stay for all F neurons, dropped ones too. The paper writes eq. 11 for GRIFFIN, whose mask is the prompt's. For
CATS the mask is the token's: the neurons whose original gate reaches the threshold, |act(x W_g)| >= tau.

Trained as Caprese is: layer-wise (eq. 7), then end to end (eq. 8), with the hyperparameters of table 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from caprese_distill.data.samples import Sample
from caprese_distill.end_to_end.train import Recipe, Trainer, train, training_identity
from caprese_distill.student import frozen
from caprese_kernels.config import BaseModelInfo, Method

from ..hugging_face.students import EndToEnd, LayerWise
from .served.kernels import equal_rank


class Lora(nn.Module):
    """A, B of one layer, float32, rounded to x's dtype at every use.

    A_g, A_1 [D, r] and A_2 [F, r] are drawn with variance 1 / inputs; B_g, B_1 [r, F] and B_2 [r, D] begin at zero, so
    that training begins at the plain method.
    """

    def __init__(self, depth: int, neurons: int, rank: int, generator: torch.Generator):
        super().__init__()
        shapes = {"gate": (depth, neurons), "up": (depth, neurons), "down": (neurons, depth)}
        self.a = nn.ParameterDict(
            {
                name: torch.randn(inputs, rank, generator=generator) * inputs**-0.5
                for name, (inputs, _) in shapes.items()
            }
        )
        self.b = nn.ParameterDict({name: torch.zeros(rank, outputs) for name, (_, outputs) in shapes.items()})

    def low(self, name: str, x: Tensor) -> Tensor:
        """x A B of one projection."""
        return x @ self.a[name].to(x.dtype) @ self.b[name].to(x.dtype)

    def forward(self, block: Any, x: Tensor, u: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        """Eq. 11, [..., D], of x [..., D], u = x W_g and v = x W_1 [..., F], and keep [..., F] bool."""
        gate = block.act_fn(torch.where(keep, u, 0) + self.low("gate", x))
        z = gate * (torch.where(keep, v, 0) + self.low("up", x))
        return block.down_proj(torch.where(keep, z, 0)) + self.low("down", z)


def lora_rank(info: BaseModelInfo, rank: int) -> int:
    """The r' whose 3 r' (D + F) parameters come nearest to the 2 D r of L and R; at least 1."""
    return equal_rank(info.hidden_size, info.intermediate_size, rank)


def begin(info: BaseModelInfo, method: Method, seed: int, device: torch.device) -> dict[int, Lora]:
    """Untrained LoRA for every sparse layer, with the parameters of rank `method.rank` in L and R."""
    generator, rank = torch.Generator().manual_seed(seed), lora_rank(info, method.rank)
    return {i: Lora(info.hidden_size, info.intermediate_size, rank, generator).to(device) for i in method.layers}


def tensors(lora: Mapping[int, nn.Module]) -> dict[str, Tensor]:
    """By names for a file."""
    return {f"layers.{i}.{name}": t for i, each in lora.items() for name, t in each.state_dict().items()}


def load_tensors(lora: Mapping[int, nn.Module], found: Mapping[str, Tensor]) -> None:
    """The inverse of `tensors`, in place."""
    for i, each in lora.items():
        prefix = f"layers.{i}."
        each.load_state_dict({name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)})


def fit(
    stage: type[LayerWise] | type[EndToEnd],
    model: Any,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    lora: Mapping[int, Lora],
    recipe: Recipe,
    resume: Path | None = None,
    console: Console | None = None,
) -> Trainer:
    """Train `lora` in place by eq. 7 or eq. 8 on nine tenths of the samples; a killed run goes on from `resume`.

    The trainer tells seconds and held-out errors, ||target - student||^2 / ||target||^2 before and after each epoch.
    """
    identity = {}
    if resume is not None:
        identity = training_identity(model, samples, method, tensors(lora), recipe) | {"stage": stage.title}
    with frozen(model, recipe.gradient_checkpointing), stage(model, info, method, lora) as student:
        return train(model, student, samples, recipe, resume, identity, console)
