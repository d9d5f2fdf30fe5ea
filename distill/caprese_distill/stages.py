"""Layer-wise, then end to end: the stages of a distillation, each of which a killed run need not do twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from caprese_kernels.adapters import Adapters
from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError

from . import checkpoint
from .adam import AdamSettings
from .cluster import Cluster
from .data import Sample
from .end_to_end import Recipe, distill_end_to_end
from .layerwise import distill_layer_wise


class Here:
    """The stages' work in this process; `cluster.Cluster` has the same methods."""

    def __init__(self, model: Any):
        self.model = model

    def fingerprint(self, samples: Sequence[Sample], **settings: Any) -> dict[str, Any]:
        return checkpoint.fingerprint(self.model, samples, **settings, dtype=str(self.model.dtype))

    def layer_wise(self, *work: Any) -> Adapters:
        return distill_layer_wise(self.model, *work)

    def end_to_end(self, *work: Any) -> Adapters:
        return distill_end_to_end(self.model, *work)


def run_stages(
    model: Any,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    recipe: Recipe | None,
    output: Path,
    console: Console | None = None,
    logs: Path | None = None,
    adam: AdamSettings | None = None,
) -> Adapters:
    """Adapters by the layer-wise stage and, given a recipe, the end-to-end one; not yet written to `output`.

    `model` is a transformers causal LM, or the cluster.Cluster whose workers have it.
    The layer-wise stage is the closed form, or Adam if its settings are given (not on a cluster).
    Beside `output`, hidden files hold what a killed run has done; `clean_up` removes them once `output` is written.
    `logs` is a directory for TensorBoard.
    """
    resume = checkpoint.resume_path(output)
    place = model if isinstance(model, Cluster) else Here(model)
    adapters = _first_stage(place, samples, info, method, output, recipe is not None, console, adam)
    if recipe is None:
        return adapters
    with _writer(logs) as writer:
        return place.end_to_end(samples, info, method, adapters, recipe, resume, console, writer)


def clean_up(output: Path) -> None:
    """After `output` was written: the hidden files beside it go."""
    checkpoint.remove(checkpoint.resume_path(output))
    _layer_wise_path(output).unlink(missing_ok=True)
    shutil.rmtree(scratch_path(output), ignore_errors=True)


def scratch_path(output: Path) -> Path:
    """Where Ray Train keeps its own files of a run."""
    return output.with_name(f".{output.name}.ray")


def _first_stage(
    place: Here | Cluster,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    output: Path,
    keep: bool,
    console: Console | None,
    adam: AdamSettings | None,
) -> Adapters:
    """The layer-wise adapters: those that an earlier run with the same settings left, or made now."""
    path, resume = _layer_wise_path(output), checkpoint.resume_path(output)
    settings = {"method": method.name, "density": method.density, "layers": list(method.layers), "rank": method.rank}
    solver = asdict(adam) if adam else None
    identity = json.dumps(place.fingerprint(samples, **settings, solver=solver))
    digest = hashlib.sha256(identity.encode()).hexdigest()
    if path.exists():
        with contextlib.suppress(CapreseError):  # what cannot be read is made again
            found = Adapters.load(path)
            if found.config.training.pop("identity", None) == digest:
                if console:
                    console.print(f"layer-wise stage: done before, {path}")
                return found
    adapters = place.layer_wise(samples, info, method, resume, console, adam)
    if keep:
        marked = adapters.config.model_copy(update={"training": adapters.config.training | {"identity": digest}})
        Adapters(marked, adapters.left, adapters.right).save(path)
        checkpoint.remove(resume)
    return adapters


def _layer_wise_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.layer-wise")


@contextlib.contextmanager
def _writer(logs: Path | None) -> Iterator[Any]:
    if logs is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise CapreseError(
            "--tensorboard", expected="the package tensorboard", found="none", fix="pip install tensorboard"
        ) from None
    with SummaryWriter(str(logs)) as writer:
        yield writer
