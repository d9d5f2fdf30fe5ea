"""The LoRA baseline (paper, section 3.5, eq. 11, and appendix C): as many parameters, on the masked FF weights.

    FF~(x) = (act(x (W~_g + A_g B_g)) * (x (W~_1 + A_1 B_1))) (W~_2 + A_2 B_2)

W~ are the weights with the columns of W_g, W_1 and the rows of W_2 of dropped neurons set to zero; LoRA's own products
are computed for all F neurons, dropped ones too. The paper gives eq. 11 for GRIFFIN, where the prompt decides which
neurons are kept. For CATS each token decides: kept are the neurons whose original gate reaches the threshold,
|act(x W_g)| >= tau.

LoRA is trained as Caprese is: layer-wise (eq. 7), then end to end (eq. 8), with the hyperparameters of table 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caprese_distill.data.samples import Sample
from caprese_distill.end_to_end.train import Recipe, Trainer, train, training_identity
from caprese_distill.student import frozen
from caprese_kernels import terminal
from caprese_kernels.config import BaseModelInfo, Method

from ..hugging_face.students import EndToEnd, LayerWise
from .served.kernels import equal_rank


class Lora(nn.Module):
    """A and B of one layer, float32, rounded to x's dtype whenever they are used.

    A_g, A_1 [D, r] and A_2 [F, r] are random with variance 1 / inputs; B_g, B_1 [r, F] and B_2 [r, D] start at zero, so
    that training starts at the plain method.
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
        """x A B of one projection, [..., outputs]."""
        return x @ self.a[name].to(x.dtype) @ self.b[name].to(x.dtype)

    def forward(self, block: Any, x: Tensor, u: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        """Eq. 11, [..., D], from x [..., D], u = x W_g and v = x W_1 [..., F], and keep [..., F] bool."""
        gate = block.act_fn(torch.where(keep, u, 0) + self.low("gate", x))
        z = gate * (torch.where(keep, v, 0) + self.low("up", x))
        return block.down_proj(torch.where(keep, z, 0)) + self.low("down", z)


def lora_rank(info: BaseModelInfo, rank: int) -> int:
    """The r' whose 3 r' (D + F) parameters are closest to the 2 D r of L and R; at least 1."""
    return equal_rank(info.hidden_size, info.intermediate_size, rank)


def begin(info: BaseModelInfo, method: Method, seed: int, device: torch.device) -> dict[int, Lora]:
    """Untrained LoRA for every sparse layer, with as many parameters as L and R of rank `method.rank`."""
    generator, rank = torch.Generator().manual_seed(seed), lora_rank(info, method.rank)
    return {i: Lora(info.hidden_size, info.intermediate_size, rank, generator).to(device) for i in method.layers}


def tensors(lora: Mapping[int, nn.Module]) -> dict[str, Tensor]:
    """All A and B by their names in a file."""
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
) -> Trainer:
    """Train `lora` in place by eq. 7 or eq. 8 on nine tenths of the samples; a killed run continues from `resume`.

    The trainer holds the seconds and the held-out errors, ||target - student||^2 / ||target||^2 before and after each
    epoch.
    """
    identity = {}
    if resume is not None:
        identity = training_identity(model, samples, method, tensors(lora), recipe) | {"stage": stage.title}
    with frozen(model, recipe.gradient_checkpointing), stage(model, info, method, lora) as student:
        return train(model, student, samples, recipe, resume, identity, terminal.notes())
