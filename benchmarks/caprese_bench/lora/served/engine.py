"""GRIFFIN + LoRA as a variant of the engine: a vLLM plugin that registers FF kernels with `caprese_vllm.ff_kernels`.

LoRA is the paper's comparison, not a feature: its weights stay unmerged, as the paper measures it (section 4.4), and A
and B are plain matrix products around the product's own sparse kernels (kernels.py).

    caprese = {"method": "griffin", "kernel_extension": EXTENSION}
    Engine(log, EngineSettings(model, caprese, options, variables(folder, rank=256)))

The engine then reports its kernel as "lora over ...", which proves what ran.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from caprese_kernels.backend import Backend, RowPlan
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF

from . import kernels

if TYPE_CHECKING:  # config needs pydantic, `caprese bench decode` only torch
    from caprese_kernels.config import Method

# JSON: {"rank": r of the L and R to match, "weights": a file, or null for random ones}
VARIABLE = "CAPRESE_SERVED_LORA"
EXTENSION = "lora"  # the name of these kernels


def variables(folder: Path, rank: int, weights: Path | None = None) -> dict[str, str]:
    """Environment of an engine whose GRIFFIN blocks run with LoRA of as many parameters as L and R of that rank.

    `weights` is a file of `lora.tensors`; random ones without. The plugin's metadata is written into `folder`.
    """
    place = folder / "caprese_served_lora-0.dist-info"
    place.mkdir(exist_ok=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: caprese-served-lora\nVersion: 0\n")
    (place / "entry_points.txt").write_text(f"[vllm.general_plugins]\nserved_lora = {__name__}:install\n")
    given = {"rank": rank, "weights": weights and str(weights)}
    return {
        VARIABLE: json.dumps(given),
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }


def install() -> None:
    """vLLM calls it in every process: offer the kernels to the engine (`caprese_vllm.ff_kernels`)."""
    from caprese_vllm import ff_kernels  # vLLM is there; the benchmark's own process does without

    ff_kernels.register(EXTENSION, lora_kernels, cuda_graphs=True)


def lora_kernels(backend: Backend, method: Method, blocks: Mapping[int, PackedFF]) -> Backend:
    """GRIFFIN with the LoRA that the environment names, over `backend`; CapreseError for another method."""
    if method.name != "griffin" or method.rank or method.has_core:
        raise CapreseError(
            "LoRA", expected="plain GRIFFIN below it", found=str(method), fix="serve {'method': 'griffin'}"
        )
    if VARIABLE not in os.environ:
        raise CapreseError(
            "LoRA", expected=f"${VARIABLE}", found="none", fix="start the engine with the environment of `variables`"
        )
    given = json.loads(os.environ[VARIABLE])
    path = given["weights"]
    lora = load(blocks, Path(path)) if path else draw(blocks, given["rank"])
    return cast(Backend, LoraKernels(backend, lora))


@dataclass(frozen=True)
class Lora:
    """A and B of one FF block, in its dtype: r' of `lora.lora_rank`."""

    ff: PackedFF
    a_in: Tensor  # [D, 2 r'], A_g then A_1
    b_in: Tensor  # [2, r', F], B_g and B_1
    a_down: Tensor  # [F, r']
    b_down: Tensor  # [r', D]

    def forward(
        self,
        backend: Backend,
        x: Tensor,
        keep: Tensor,
        slots: Tensor,
        row_plan: RowPlan | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Eq. 11, y [T, D] of x [T, D]: two products before the sparse halves, two after them."""
        rank = self.a_down.shape[1]
        inner = (x @ self.a_in).view(len(x), 2, rank).transpose(0, 1)
        z, given = kernels.up(backend, x, torch.bmm(inner, self.b_in), self.ff, keep, slots, row_plan)
        y = kernels.down(backend, given, self.ff, keep, slots)
        return torch.addmm(y, z @ self.a_down, self.b_down, out=out)


class LoraKernels:
    """A Backend whose GRIFFIN has LoRA; the one below computes the rest."""

    def __init__(self, below: Backend, lora: dict[int, Lora]):
        self.below, self.NAME = below, f"lora over {below.NAME}"
        self.of = {id(each.ff): each for each in lora.values()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)

    def griffin_ff(
        self,
        x: Tensor,
        ff: PackedFF,
        keep: Tensor,
        slots: Tensor,
        row_plan: RowPlan | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Eq. 11 with the block's own A and B."""
        return self.of[id(ff)].forward(self.below, x, keep, slots, row_plan, out)


def draw(blocks: Mapping[int, PackedFF], rank: int) -> dict[int, Lora]:
    """Random A and B for each layer's block, of as many parameters as L and R of `rank`."""
    made = {}
    for layer, ff in blocks.items():
        r = kernels.equal_rank(ff.hidden_size, ff.num_neurons, rank)
        shapes = {"gate": (ff.hidden_size, ff.num_neurons), "up": (ff.hidden_size, ff.num_neurons)}
        shapes["down"] = (ff.num_neurons, ff.hidden_size)
        generator = torch.Generator().manual_seed(layer)
        parts = {}
        for name, (inputs, outputs) in shapes.items():
            parts[f"a.{name}"] = torch.randn(inputs, r, generator=generator) * inputs**-0.5
            parts[f"b.{name}"] = torch.randn(r, outputs, generator=generator) * 1e-2
        made[layer] = _assemble(ff, parts)
    return made


def load(blocks: Mapping[int, PackedFF], path: Path) -> dict[int, Lora]:
    """Trained A and B, from a file of `lora.tensors`."""
    from safetensors.torch import load_file

    found = load_file(path)
    parts = {layer: {n.removeprefix(f"layers.{layer}."): t for n, t in found.items()} for layer in blocks}
    return {layer: _assemble(ff, parts[layer]) for layer, ff in blocks.items()}


def _assemble(ff: PackedFF, parts: dict[str, Tensor]) -> Lora:
    kernels.check(ff)
    a, b = ({name: parts[f"{side}.{name}"].to(ff.down_plus) for name in ("gate", "up", "down")} for side in ("a", "b"))
    inner = torch.cat([a["gate"], a["up"]], dim=1).contiguous()
    return Lora(ff, inner, torch.stack([b["gate"], b["up"]]), a["down"].contiguous(), b["down"].contiguous())
