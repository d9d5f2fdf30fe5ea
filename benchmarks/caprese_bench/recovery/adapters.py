"""The corrections that `caprese bench recovery` compares: each is trained once and kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caprese_distill import checkpoint
from caprese_distill.checkpoint import digest
from caprese_distill.data.samples import Sample
from caprese_distill.end_to_end.train import Recipe, distill_end_to_end
from caprese_distill.layer_wise.adam import AdamSettings
from caprese_distill.layer_wise.closed_form import distill_layer_wise
from caprese_kernels import terminal
from caprese_kernels.adapters import Adapters
from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError

from ..hugging_face.students import EndToEnd, LayerWise, LowRank
from ..lora.training import begin, fit, load_tensors, tensors
from .demo_settings import Settings

# Label by stage; the files are METHOD-STAGE.safetensors.
STAGES = {
    "adam": "layer-wise, Adam",
    "closed-form": "layer-wise, closed form",
    "end-to-end": "end to end",
    "lora-layer-wise": "LoRA, layer-wise",
    "lora-end-to-end": "LoRA, end to end",
}


@dataclass
class Correction:
    """What is added to the sparse method: a module for each layer, and the wall seconds of its training, all stages."""

    ff: dict[int, nn.Module]
    seconds: float

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for each in self.ff.values() for p in each.parameters())


class CorrectionStore:
    """The corrections of one method for one model and its samples.

    Files in `given` are used as they are. The others are trained and written to `folder`, unless an earlier run with
    the same model, samples and settings wrote them there. An interrupted training continues where it stopped.
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sample],
        info: BaseModelInfo,
        method: Method,
        settings: Settings,
        folder: Path,
        given: Path | None,
        quick: bool,
    ):
        self.model, self.samples, self.info, self.method = model, samples, info, method
        self.folder, self.given = folder, given
        few: dict[str, Any] = {"epochs": 1} if quick else {}
        self.adam = AdamSettings(lr=settings.adam, **few)
        self.recipes = {
            stage: Recipe(rate, **share, gradient_checkpointing=False)  # the models are small
            for stage, rate, share in (
                ("end-to-end", settings.end_to_end, few),
                # Table 6: batch and epochs as for L and R by Adam.
                ("lora-layer-wise", settings.lora_layer_wise, {"batch": self.adam.batch, "epochs": self.adam.epochs}),
                ("lora-end-to-end", settings.lora_end_to_end, few),
            )
        }

    @cached_property
    def base(self) -> dict[str, Any]:
        """What the identity of every correction includes."""
        sparse = {"density": self.method.density, "layers": list(self.method.layers), "rank": self.method.rank}
        versions = {"dtype": str(self.model.dtype), "torch": torch.__version__}
        return checkpoint.fingerprint(self.model, self.samples, method=self.method.name, **sparse, **versions)

    def plain(self) -> Correction:
        """The method without a correction."""
        left, right = torch.zeros(self.info.hidden_size, 0), torch.zeros(0, self.info.hidden_size)
        return Correction({i: LowRank(left, right).to(self.model.device) for i in self.method.layers}, 0.0)

    def make(self, stage: str) -> Correction:
        """The correction of one of STAGES, trained if no file has it."""
        if stage.startswith("lora"):
            return self._lora(stage)
        adapters = self._adapters(stage)
        ff = {i: LowRank(adapters.left[i], adapters.right[i]).to(self.model.device) for i in self.method.layers}
        return Correction(dict[int, nn.Module](ff), adapters.config.training.get("seconds", 0.0))

    def _identity(self, stage: str, initial: Mapping[str, Tensor]) -> str:
        """Digest of all that a stage depends on, if it begins with `initial`."""
        recipes = {"adam": asdict(self.adam)} | {name: asdict(recipe) for name, recipe in self.recipes.items()}
        return hashlib.sha256(json.dumps([self.base, stage, recipes.get(stage), digest(initial)]).encode()).hexdigest()

    def _path(self, stage: str) -> tuple[Path, bool]:
        """The stage's file, and whether it is one of `given`."""
        name = f"{self.method.name}-{stage}.safetensors"
        if self.given and (self.given / name).exists():
            return self.given / name, True
        return self.folder / name, False

    def _adapters(self, stage: str) -> Adapters:
        path, given = self._path(stage)
        if given:
            return self._checked(path)
        initial = self._adapters("closed-form") if stage == "end-to-end" else None
        identity = self._identity(stage, initial.tensors() if initial else {})
        if path.exists():
            found = Adapters.load(path)
            if found.config.training.get("identity") == identity:
                return found
        resume, common = checkpoint.resume_path(path), (self.model, self.samples, self.info, self.method)
        self._announce(stage)
        if initial:
            made = distill_end_to_end(self.model, self.samples, initial, self.recipes[stage], resume, terminal.notes())
        else:
            made = distill_layer_wise(*common, resume, terminal.notes(), self.adam if stage == "adam" else None)
        made.config.training["identity"] = identity
        made.save(path)
        checkpoint.remove(resume)
        return made

    def _lora(self, stage: str) -> Correction:
        path, given = self._path(stage)
        lora, seconds, identity = begin(self.info, self.method, 0, self.model.device), 0.0, {}
        if not given:
            if stage == "lora-end-to-end":
                first = self._lora("lora-layer-wise")
                load_tensors(lora, tensors(first.ff))
                seconds = first.seconds
            identity = {"settings": self._identity(stage, tensors(lora))}
        found = checkpoint.load(path, identity) if path.exists() else "no file"
        if not isinstance(found, str):
            try:
                load_tensors(lora, found[0])
            except RuntimeError:  # other names or shapes
                raise self._mismatch(path, "LoRA of other layers or another rank") from None
            return Correction(dict[int, nn.Module](lora), found[1]["seconds"])
        if given:
            raise self._mismatch(path, found)
        self._announce(stage)
        resume, task = checkpoint.resume_path(path), EndToEnd if stage == "lora-end-to-end" else LayerWise
        common = (self.model, self.samples, self.info, self.method)
        trainer = fit(task, *common, lora, self.recipes[stage], resume)
        seconds = round(seconds + trainer.seconds, 1)
        checkpoint.save(path, tensors(lora), {"seconds": seconds}, identity)
        checkpoint.remove(resume)
        return Correction(dict[int, nn.Module](lora), seconds)

    def _checked(self, path: Path) -> Adapters:
        """Load given adapters. Raises CapreseError if they are for another method or model."""
        found, ours = Adapters.load(path), self.method
        config = found.config
        config.base_model.check_serves(self.info, str(path))
        theirs = (config.method, config.density, tuple(config.layers), config.rank)
        if theirs != (ours.name, ours.density, tuple(ours.layers), ours.rank):
            raise self._mismatch(path, "{}, density {:g}, layers {}, rank {}".format(*theirs))
        return found

    def _mismatch(self, path: Path, found: str) -> CapreseError:
        ours = self.method
        expected = f"{ours.name}, density {ours.density:g}, layers {ours.layers}, rank {ours.rank}"
        return CapreseError(f"adapters {path}", expected=expected, found=found, fix="remove it from --adapters")

    def _announce(self, stage: str) -> None:
        terminal.notes().print(f"{self.method.name}: {STAGES[stage]}")
