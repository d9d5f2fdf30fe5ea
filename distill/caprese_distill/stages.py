"""Runs the stages of a distillation: layer-wise, then end to end. A killed run does not repeat what it finished."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from safetensors import SafetensorError

from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError

from . import checkpoint
from .data.batches import Batch, make_batches, pack
from .data.samples import Sample, split
from .end_to_end.train import RankContext, distill_end_to_end, steps_of, training_identity
from .kept import kept_files, set_aside, take_back
from .layer_wise.adam import AdamSettings, Descent
from .layer_wise.closed_form import distill_layer_wise
from .layer_wise.passes import pass_identity
from .layer_wise.weighted import distill_weighted, weighted_identity
from .placement import return_freed
from .scale.cluster import Cluster
from .work import RemainingWork, Work


class Executor(Protocol):
    """Computes the stages: in this process (`LocalExecutor`), or on workers (`Cluster`)."""

    def fingerprint(self, samples: Sequence[Sample], **settings: Any) -> dict[str, Any]:
        """`checkpoint.fingerprint` of its model."""
        ...

    def layer_wise(self, work: Work, resume: Path, console: Console | None) -> Adapters:
        """`distill_layer_wise` with its model."""
        ...

    def end_to_end(self, work: Work, initial: Adapters, resume: Path, console: Console | None, writer: Any) -> Adapters:
        """`distill_end_to_end` with its model."""
        ...


class LocalExecutor:
    """The model, a transformers causal LM, in this process."""

    def __init__(self, model: Any):
        self.model = model

    def fingerprint(self, samples: Sequence[Sample], **settings: Any) -> dict[str, Any]:
        return checkpoint.fingerprint(self.model, samples, **settings, dtype=str(self.model.dtype))

    def layer_wise(self, work: Work, resume: Path, console: Console | None) -> Adapters:
        return distill_layer_wise(self.model, work.samples, work.info, work.method, resume, console, work.adam)

    def end_to_end(self, work: Work, initial: Adapters, resume: Path, console: Console | None, writer: Any) -> Adapters:
        assert work.recipe is not None
        ranks = RankContext(writer)
        return distill_end_to_end(self.model, work.samples, initial, work.recipe, resume, console, ranks)


def remaining_work(model: Any, work: Work, output: Path) -> RemainingWork:
    """What `run_stages` with the same arguments would do: everything, or what an earlier run left."""
    samples, method, recipe = work.samples, work.method, work.recipe
    resume = checkpoint.resume_path(output)
    unweighted = replace(work, weighting=False)
    initial = _load_stage(_layer_wise_path(output), _identity(LocalExecutor(model), unweighted))
    if work.weighting:
        weighted = _load_stage(_weighted_path(output), _identity(LocalExecutor(model), work))
        if weighted is None:
            return _remaining_weighted(model, work, output, initial)
        initial = weighted
    progress = None
    batches: Sequence[Batch] = []
    if initial is None:
        if resume.exists():
            progress = checkpoint.load_progress(resume, pass_identity(model, samples, method, work.adam))
        batches = _layer_wise_batches(samples, next(model.parameters()).device, work.adam, progress or {})
    layers = method.layers if initial is None and work.adam is None else ()
    if recipe is None:
        return RemainingWork(batches, layers, [], 0, initial is not None or bool(progress))
    steps, evaluations = steps_of(split(samples)[0], recipe), recipe.epochs + 1
    if initial is not None and resume.exists():
        identity = training_identity(model, samples, method, initial.tensors(), recipe)
        progress = checkpoint.load_progress(resume, identity)
        if progress:
            steps, evaluations = steps[progress["step"] :], evaluations - len(progress["errors"])
    return RemainingWork(batches, layers, steps, evaluations, initial is not None or bool(progress))


def _remaining_weighted(model: Any, work: Work, output: Path, initial: Adapters | None) -> RemainingWork:
    """As `remaining_work`, while the weighted closed form is not done."""
    first = remaining_work(model, replace(work, weighting=False), output)
    batches, resume = make_batches(work.samples, next(model.parameters()).device), checkpoint.resume_path(output)
    progress = None
    if initial is not None and resume.exists():
        identity = weighted_identity(model, work.samples, work.method, initial)
        progress = checkpoint.load_progress(resume, identity)
    return replace(
        first,
        layers=(*first.layers, *work.method.layers),
        resumed=first.resumed or bool(progress),
        weighted=batches[(progress or {}).get("batches", 0) :],
    )


def _layer_wise_batches(
    samples: Sequence[Sample], device: torch.device, adam: AdamSettings | None, progress: dict[str, Any]
) -> list[Batch]:
    """The batches still to feed to the original model: those of one pass; with Adam, those of every step before it."""
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
    model: Any, work: Work, output: Path, console: Console | None = None, logs: Path | None = None
) -> Adapters:
    """The adapters of `work`, not yet written to `output`.

    `model` is a transformers causal LM, or the Cluster whose workers have it (without Adam and weighting). Hidden files
    beside `output` hold what a killed run has done; `clean_up` removes them once `output` is written. `logs` is a
    directory for TensorBoard.
    """
    resume = checkpoint.resume_path(output)
    executor: Executor = model if isinstance(model, Cluster) else LocalExecutor(model)
    keep = work.recipe is not None
    adapters = _layer_wise_stage(executor, work, output, keep or work.weighting, console)
    if work.weighting:
        adapters = _weighted_stage(model, work, output, keep, console, adapters)
    elif _weighted_path(output).exists():
        set_aside(_weighted_path(output))
    if work.recipe is None:
        return adapters
    return_freed()
    with _summary_writer(logs) as writer:
        return executor.end_to_end(work, adapters, resume, console, writer)


def save(adapters: Adapters, path: Path) -> None:
    """Write the adapter file, whole or not at all; CapreseError where it cannot be written."""
    try:
        adapters.save(path)
    except (OSError, SafetensorError) as error:
        raise CapreseError(
            f"output {path}",
            expected="a file that can be written",
            found=getattr(error, "strerror", None) or str(error),
            fix="free some space, or give another --output; the same command continues from the last checkpoint",
        ) from None


def held_bytes(output: Path) -> int:
    """Bytes of the files that a killed run left beside `output`."""
    files = (checkpoint.resume_path(output), _layer_wise_path(output), _weighted_path(output))
    return sum(path.stat().st_size for path in files if path.exists())


def clean_up(output: Path) -> None:
    """Remove the hidden files of this run beside `output`, once it is written; those of other runs stay."""
    checkpoint.remove(checkpoint.resume_path(output))
    if kept_files(_layer_wise_path(output)) or not kept_files(checkpoint.resume_path(output)):  # else one goes on here
        _layer_wise_path(output).unlink(missing_ok=True)
    _weighted_path(output).unlink(missing_ok=True)
    shutil.rmtree(scratch_path(output), ignore_errors=True)


def scratch_path(output: Path) -> Path:
    """The directory for Ray Train's own files of a run."""
    return output.with_name(f".{output.name}.ray")


def _layer_wise_stage(executor: Executor, work: Work, output: Path, keep: bool, console: Console | None) -> Adapters:
    """The layer-wise adapters: those that an earlier run with the same settings left, or new ones."""
    path, resume = _layer_wise_path(output), checkpoint.resume_path(output)
    identity = _identity(executor, replace(work, weighting=False))
    found = _earlier_stage(path, identity, console)
    if found is not None:
        if console:
            console.print(f"layer-wise stage: done before, {path}")
        if not keep and resume.exists():  # of a run that goes on from here, which this one does not
            set_aside(resume)
        return found
    adapters = executor.layer_wise(work, resume, console)
    if keep:
        _keep_stage(adapters, path, identity, resume)
    return adapters


def _weighted_stage(
    model: Any, work: Work, output: Path, keep: bool, console: Console | None, initial: Adapters
) -> Adapters:
    """The adapters of the weighted closed form: those that an earlier run left, or new ones."""
    path, resume = _weighted_path(output), checkpoint.resume_path(output)
    identity = _identity(LocalExecutor(model), work)
    found = _earlier_stage(path, identity, console)
    if found is not None:
        if console:
            console.print(f"weighted closed form: done before, {path}")
        return found
    return_freed()
    adapters = distill_weighted(model, work.samples, initial, resume, console)
    if keep:
        _keep_stage(adapters, path, identity, resume)
    return adapters


def _keep_stage(adapters: Adapters, path: Path, identity: dict[str, Any], resume: Path) -> None:
    marked = adapters.config.model_copy(update={"training": adapters.config.training | {"identity": identity}})
    save(Adapters(marked, adapters.left, adapters.right), path)
    checkpoint.remove(resume)


def _earlier_stage(path: Path, identity: dict[str, Any], console: Console | None) -> Adapters | None:
    """The stage's adapters, if an earlier run left them; those of another run are kept beside."""
    take_back(path, lambda each: _load_stage(each, identity) is not None)
    found = _load_stage(path, identity)
    if found is None and path.exists():
        with contextlib.suppress(CapreseError):  # a file that cannot be read is made again
            there = Adapters.load(path).config.training.get("identity")
            other = [key for key in identity if not isinstance(there, dict) or there.get(key) != identity[key]]
            aside = set_aside(path)
            if console:
                belongs = f"it belongs to a run with other {', '.join(other)}"
                console.print(f"{path}: {belongs}; starting anew (kept: {aside.name})")
    return found


def _load_stage(path: Path, identity: dict[str, Any]) -> Adapters | None:
    if path.exists():
        with contextlib.suppress(CapreseError):  # a file that cannot be read is made again
            found = Adapters.load(path)
            if found.config.training.pop("identity", None) == identity:
                return found
    return None


def _identity(executor: Executor, work: Work) -> dict[str, Any]:
    """All that the last layer-wise stage of `work` depends on, as JSON values."""
    method, adam = work.method, work.adam
    settings: dict[str, Any] = {"method": method.name, "density": method.density, "layers": list(method.layers)}
    settings |= {"rank": method.rank, "solver": asdict(adam) if adam else None, "weighting": work.weighting}
    return json.loads(json.dumps(executor.fingerprint(work.samples, **settings)))


def _layer_wise_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.layer-wise")


def _weighted_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.weighted")


@contextlib.contextmanager
def _summary_writer(logs: Path | None) -> Iterator[Any]:
    """A TensorBoard SummaryWriter for the directory `logs`; None without it."""
    if logs is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(logs)) as writer:
        yield writer
