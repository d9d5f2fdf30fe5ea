"""Where a killed run goes on from: moments and progress in one safetensors file, which appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from caprese_kernels.errors import CapreseError

from .data.samples import Sample
from .placement import aligned

_SUMMED = 2**22  # weights at a time: on a CPU torch copies what it sums to float64


def resume_path(output: Path) -> Path:
    """The checkpoint beside the adapter `output`."""
    return output.with_name(f".{output.name}.resume")


def fingerprint(model: nn.Module, samples: Sequence[Sample], **settings: Any) -> dict[str, Any]:
    """What the moments depend on: the model's weights, the token ids, and `settings` (JSON values).

    Weights count by the float64 sum of each, which tells models apart without hashing gigabytes.
    """
    weights = hashlib.sha256()
    for prefix, module in model.named_modules():
        with aligned(module):
            for name, parameter in module.named_parameters(prefix, recurse=False):
                parts = parameter.detach().flatten().split(_SUMMED)
                total = sum(part.sum(dtype=torch.float64).item() for part in parts)
                weights.update(f"{name} {tuple(parameter.shape)} {total!r}".encode())
    ids = hashlib.sha256()
    for sample in samples:
        ids.update(sample.prompt_length.to_bytes(4, "little") + sample.ids.numpy().tobytes())
    return {"weights": weights.hexdigest(), "token ids": ids.hexdigest(), **settings}


def save(path: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write tensors, progress and identity; raises CapreseError when the disk refuses."""
    partial = _partial(path)
    header = {"identity": json.dumps(identity), "progress": json.dumps(progress)}
    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial, metadata=header)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        size = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**30
        raise CapreseError(
            f"checkpoint {path}",
            expected=f"room for {size:.1f} GiB beside the output",
            found=str(error),
            fix="free some space, or choose another output",
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | str:
    """Tensors and progress; or, as a string, why the file is of no use here."""
    try:
        with safe_open(path, framework="pt") as file:
            progress = _progress(file, identity)
            if isinstance(progress, str):
                return progress
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, progress
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        return f"it cannot be read ({type(error).__name__})"


def load_progress(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The progress alone; None where `load` finds nothing of use."""
    try:
        with safe_open(path, framework="pt") as file:
            progress = _progress(file, identity)
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    return None if isinstance(progress, str) else progress


def _progress(file: Any, identity: Mapping[str, Any]) -> dict[str, Any] | str:
    header = file.metadata() or {}
    found = json.loads(header["identity"])
    other = [key for key, value in identity.items() if found.get(key) != value]
    return f"it belongs to a run with other {', '.join(other)}" if other else json.loads(header["progress"])


def remove(path: Path) -> None:
    """After success: the file, and what a kill in the middle of writing left."""
    path.unlink(missing_ok=True)
    _partial(path).unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
