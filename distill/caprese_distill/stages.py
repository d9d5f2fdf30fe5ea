"""Layer-wise, then end to end: the stages of a distillation, each of which a killed run need not do twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from caprese_kernels.adapters import Adapters
from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError

from . import checkpoint
from .data.samples import Sample, split
from .end_to_end import train as end_to_end
from .end_to_end.train import Recipe, distill_end_to_end
from .layer_wise import closed_form as layerwise
from .layer_wise import weighted
from .layer_wise.adam import AdamSettings, Descent
from .layer_wise.closed_form import distill_layer_wise, make_batches, pack
from .layer_wise.moments import Batch
from .layer_wise.weighted import distill_weighted
from .placement import return_freed
from .scale.cluster import Cluster


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


@dataclass(frozen=True)
class Remaining:
    """What a run has still to do after what a killed one left."""

    batches: Sequence[Batch]  # through the original model, layer-wise
    layers: Sequence[int]  # to solve in closed form
    steps: Sequence[Sequence[Sample]]  # of training end to end
    looks: int  # at the held-out samples, end to end
    resumed: bool
    weighted: Sequence[Batch] = ()  # through original and student, for the weighted closed form


def remaining(
    model: Any,
    samples: Sequence[Sample],
    method: Method,
    recipe: Recipe | None,
    output: Path,
    adam: AdamSettings | None = None,
    weighting: bool = False,
) -> Remaining:
    """What `run_stages` with the same arguments would do: all of it, or what follows what it left."""
    resume = checkpoint.resume_path(output)
    initial = _load_stage(_layer_wise_path(output), _identity(Here(model), samples, method, adam))
    if weighting:
        again = _load_stage(_weighted_path(output), _identity(Here(model), samples, method, None, weighting))
        if again is None:
            return _remaining_weighted(model, samples, method, recipe, output, initial)
        initial = again
    progress = None
    batches: Sequence[Batch] = []
    if initial is None:
        if resume.exists():
            progress = checkpoint.load_progress(resume, layerwise.identity_of(model, samples, method, adam))
        batches = _layer_wise_batches(samples, next(model.parameters()).device, adam, progress or {})
    layers = method.layers if initial is None and adam is None else ()
    if recipe is None:
        return Remaining(batches, layers, [], 0, initial is not None or bool(progress))
    steps, looks = end_to_end.steps_of(split(samples)[0], recipe), recipe.epochs + 1
    if initial is not None and resume.exists():
        progress = checkpoint.load_progress(
            resume, end_to_end.identify(model, samples, method, initial.tensors(), recipe)
        )
        if progress:
            steps, looks = steps[progress["step"] :], looks - len(progress["errors"])
    return Remaining(batches, layers, steps, looks, initial is not None or bool(progress))


def _remaining_weighted(
    model: Any,
    samples: Sequence[Sample],
    method: Method,
    recipe: Recipe | None,
    output: Path,
    initial: Adapters | None,
) -> Remaining:
    """As `remaining`, where the weighted closed form is not done."""
    first = remaining(model, samples, method, recipe, output)
    batches, resume = make_batches(samples, next(model.parameters()).device), checkpoint.resume_path(output)
    progress = None
    if initial is not None and resume.exists():
        progress = checkpoint.load_progress(resume, weighted.identify(model, samples, method, initial))
    return replace(
        first,
        layers=(*first.layers, *method.layers),
        resumed=first.resumed or bool(progress),
        weighted=batches[(progress or {}).get("batches", 0) :],
    )


def _layer_wise_batches(
    samples: Sequence[Sample], device: torch.device, adam: AdamSettings | None, progress: dict[str, Any]
) -> list[Batch]:
    """What goes through the original model yet: one pass; before it, with Adam, that of every step."""
    last = make_batches(samples, device)[progress.get("batches", 0) :]
    if adam is None:
        return last
    fit, _ = split(samples)
    descent, batches = Descent([0], 1, 1, len(fit), adam, torch.device("cpu")), []  # for its order of samples
    for step in range(progress.get("step", 0), descent.steps):
        descent.step = step
        batches += pack([fit[i] for i in descent.draw()], device)
    return batches + last


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
    weighting: bool = False,
) -> Adapters:
    """Adapters by the layer-wise stage and, given a recipe, the end-to-end one; not yet written to `output`.

    `model` is a transformers causal LM, or the cluster.Cluster whose workers have it.
    The layer-wise stage is the closed form, or Adam if its settings are given (not on a cluster); with `weighting`
    (and without Adam, not on a cluster), the closed form follows again, weighted by the gradient.
    Beside `output`, hidden files hold what a killed run has done; `clean_up` removes them once `output` is written.
    `logs` is a directory for TensorBoard.
    """
    resume = checkpoint.resume_path(output)
    place = model if isinstance(model, Cluster) else Here(model)
    assert not (weighting and (adam or isinstance(place, Cluster))), "only the closed form is weighted, in one process"
    keep = recipe is not None
    adapters = _first_stage(place, samples, info, method, output, keep or weighting, console, adam)
    if weighting:
        adapters = _weighted_stage(model, samples, info, method, output, keep, console, adapters)
    if recipe is None:
        return adapters
    return_freed()
    with _writer(logs) as writer:
        return place.end_to_end(samples, info, method, adapters, recipe, resume, console, writer)


def save(adapters: Adapters, path: Path) -> None:
    """Write the adapter file whole; CapreseError where the disk refuses."""
    try:
        adapters.save(path)
    except (OSError, SafetensorError) as error:
        raise CapreseError(
            f"output {path}",
            expected="a file that can be written",
            found=getattr(error, "strerror", None) or str(error),
            fix="free some space, or give another --output; the same command goes on from the last checkpoint",
        ) from None


def held_bytes(output: Path) -> int:
    """Bytes of the files that a killed run left beside `output`."""
    files = (checkpoint.resume_path(output), _layer_wise_path(output), _weighted_path(output))
    return sum(path.stat().st_size for path in files if path.exists())


def clean_up(output: Path) -> None:
    """After `output` was written: the hidden files beside it go."""
    checkpoint.remove(checkpoint.resume_path(output))
    _layer_wise_path(output).unlink(missing_ok=True)
    _weighted_path(output).unlink(missing_ok=True)
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
    identity = _identity(place, samples, method, adam)
    found = _load_stage(path, identity)
    if found is not None:
        if console:
            console.print(f"layer-wise stage: done before, {path}")
        return found
    adapters = place.layer_wise(samples, info, method, resume, console, adam)
    if keep:
        _keep_stage(adapters, path, identity, resume)
    return adapters


def _weighted_stage(
    model: Any,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    output: Path,
    keep: bool,
    console: Console | None,
    initial: Adapters,
) -> Adapters:
    """The adapters of the weighted closed form, likewise."""
    path, resume = _weighted_path(output), checkpoint.resume_path(output)
    identity = _identity(Here(model), samples, method, None, weighting=True)
    found = _load_stage(path, identity)
    if found is not None:
        if console:
            console.print(f"weighted closed form: done before, {path}")
        return found
    return_freed()
    adapters = distill_weighted(model, samples, info, method, initial, resume, console)
    if keep:
        _keep_stage(adapters, path, identity, resume)
    return adapters


def _keep_stage(adapters: Adapters, path: Path, identity: str, resume: Path) -> None:
    marked = adapters.config.model_copy(update={"training": adapters.config.training | {"identity": identity}})
    save(Adapters(marked, adapters.left, adapters.right), path)
    checkpoint.remove(resume)


def _load_stage(path: Path, identity: str) -> Adapters | None:
    if path.exists():
        with contextlib.suppress(CapreseError):  # what cannot be read is made again
            found = Adapters.load(path)
            if found.config.training.pop("identity", None) == identity:
                return found
    return None


def _identity(
    place: Here | Cluster, samples: Sequence[Sample], method: Method, adam: AdamSettings | None, weighting: bool = False
) -> str:
    settings: dict[str, Any] = {"method": method.name, "density": method.density, "layers": list(method.layers)}
    settings |= {"rank": method.rank, "solver": asdict(adam) if adam else None, "weighting": weighting}
    identity = json.dumps(place.fingerprint(samples, **settings))
    return hashlib.sha256(identity.encode()).hexdigest()


def _layer_wise_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.layer-wise")


def _weighted_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.weighted")


@contextlib.contextmanager
def _writer(logs: Path | None) -> Iterator[Any]:
    if logs is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(logs)) as writer:
        yield writer
