"""Runs the stages of a distillation: priors, layer-wise, end to end. A killed run does not repeat what it finished."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor

from caprese_kernels.adapters import Adapters

from . import checkpoint
from .blocks import adapter_config
from .data.batches import Batch, make_batches, pack
from .data.samples import Sample, split
from .end_to_end.train import RankContext, distill_end_to_end, steps_of, training_identity
from .kept import OTHER_RUN, set_aside
from .layer_wise.adam import AdamSettings, Descent
from .layer_wise.closed_form import distill_layer_wise
from .layer_wise.passes import pass_identity
from .layer_wise.weighted import distill_weighted, weighted_identity
from .placement import return_freed
from .prior import collect_priors, prior_batches, prior_identity
from .quality import Quality, measure_adapters
from .scale.cluster import Cluster
from .selection import Priors, selection_settings, uniform_priors
from .stage_files import (
    Identity,
    earlier_stage,
    find_stage,
    keep_stage,
    layer_wise_path,
    prior_path,
    prior_resume_path,
    stage_identity,
    weighted_path,
)
from .work import RemainingWork, Work


class Executor(Protocol):
    """Computes the stages: in this process (`LocalExecutor`), or on workers (`Cluster`)."""

    def fingerprint(self, samples: Sequence[Sample], **settings: Any) -> dict[str, Any]:
        """`checkpoint.fingerprint` of its model."""
        ...

    def priors(self, work: Work, resume: Path, console: Console | None) -> dict[int, Tensor]:
        """`collect_priors` with its model, of the samples to fit."""
        ...

    def layer_wise(self, work: Work, resume: Path, console: Console | None) -> Adapters:
        """`distill_layer_wise` with its model."""
        ...

    def end_to_end(self, work: Work, initial: Adapters, resume: Path, console: Console | None, writer: Any) -> Adapters:
        """`distill_end_to_end` with its model."""
        ...

    def quality(self, samples: Sequence[Sample], adapters: Adapters, console: Console | None) -> dict[str, Quality]:
        """`measure_adapters` with its model."""
        ...


class LocalExecutor:
    """The model, a transformers causal LM, in this process."""

    def __init__(self, model: Any):
        self.model = model

    def fingerprint(self, samples: Sequence[Sample], **settings: Any) -> dict[str, Any]:
        return checkpoint.fingerprint(self.model, samples, **settings, dtype=str(self.model.dtype))

    def priors(self, work: Work, resume: Path, console: Console | None) -> dict[int, Tensor]:
        return collect_priors(self.model, split(work.samples)[0], work.info, work.method, resume, console)

    def layer_wise(self, work: Work, resume: Path, console: Console | None) -> Adapters:
        settings = (resume, console, work.adam, work.priors)
        return distill_layer_wise(self.model, work.samples, work.info, work.method, *settings)

    def end_to_end(self, work: Work, initial: Adapters, resume: Path, console: Console | None, writer: Any) -> Adapters:
        assert work.recipe is not None
        ranks = RankContext(writer)
        return distill_end_to_end(self.model, work.samples, initial, work.recipe, resume, console, ranks)

    def quality(self, samples: Sequence[Sample], adapters: Adapters, console: Console | None) -> dict[str, Quality]:
        return measure_adapters(self.model, adapters, samples, console)


def remaining_work(model: Any, work: Work, output: Path) -> RemainingWork:
    """What `run_stages` with the same arguments would do: everything, or what an earlier run left."""
    if work.collects_priors:
        return _remaining_from_priors(model, work, output)
    stage = find_stage(layer_wise_path(output), _identity(LocalExecutor(model), replace(work, weighting=False)))
    files = [stage.path] if stage else []
    initial = stage.adapters if stage else None
    if work.weighting:
        weighted = find_stage(weighted_path(output), _identity(LocalExecutor(model), work))
        if weighted is None:
            return _remaining_weighted(model, work, output, initial)
        files.append(weighted.path)
        initial = weighted.adapters
    if initial is None:
        return _remaining_layer_wise(model, work, output)
    recipe = work.recipe
    if recipe is None:
        return RemainingWork([], (), [], 0, True, files=files)
    steps, evaluations = steps_of(split(work.samples)[0], recipe), recipe.epochs + 1
    identify = partial(training_identity, model, work.samples, work.method, initial.tensors(), recipe)
    found = checkpoint.find_progress(checkpoint.resume_path(output), identify)
    if found:
        files.append(found[0])
        steps, evaluations = steps[found[1]["step"] :], evaluations - len(found[1]["errors"])
    return RemainingWork([], (), steps, evaluations, True, files=files)


def _remaining_layer_wise(model: Any, work: Work, output: Path) -> RemainingWork:
    """As `remaining_work`, while the layer-wise stage is not done."""
    identify = partial(pass_identity, model, work.samples, work.method, work.adam, work.priors)
    found = checkpoint.find_progress(checkpoint.resume_path(output), identify)
    batches = _layer_wise_batches(work.samples, next(model.parameters()).device, work.adam, found[1] if found else {})
    layers = work.method.layers if work.adam is None else ()
    steps = steps_of(split(work.samples)[0], work.recipe) if work.recipe else []
    evaluations = work.recipe.epochs + 1 if work.recipe else 0
    return RemainingWork(batches, layers, steps, evaluations, bool(found), files=[found[0]] if found else [])


def _remaining_from_priors(model: Any, work: Work, output: Path) -> RemainingWork:
    """As `remaining_work`, for a run that begins with the priors."""
    fit, method = split(work.samples)[0], work.method
    stage = find_stage(prior_path(output), _prior_identity(LocalExecutor(model), work))
    priors = stage.adapters.prior if stage else uniform_priors(work.info, method)
    rest = remaining_work(model, replace(work, priors=priors, collects_priors=False), output)
    if stage:
        return replace(rest, resumed=True, files=[*rest.files, stage.path])
    found = checkpoint.find_progress(prior_resume_path(output), partial(prior_identity, model, fit, method))
    batches = prior_batches(model, fit)[found[1]["batches"] if found else 0 :]
    files = [*rest.files, found[0]] if found else rest.files
    return replace(rest, prior=batches, resumed=rest.resumed or bool(found), files=files)


def _remaining_weighted(model: Any, work: Work, output: Path, initial: Adapters | None) -> RemainingWork:
    """As `remaining_work`, while the weighted closed form is not done."""
    first = remaining_work(model, replace(work, weighting=False), output)
    batches, found = make_batches(work.samples, next(model.parameters()).device), None
    if initial is not None:
        identify = partial(weighted_identity, model, work.samples, work.method, initial)
        found = checkpoint.find_progress(checkpoint.resume_path(output), identify)
    return replace(
        first,
        layers=(*first.layers, *work.method.layers),
        resumed=first.resumed or bool(found),
        weighted=batches[found[1]["batches"] if found else 0 :],
        files=[*first.files, found[0]] if found else first.files,
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


def executor_of(model: Any) -> Executor:
    """What computes with `model`: a transformers causal LM, or the Cluster whose workers have it."""
    return model if isinstance(model, Cluster) else LocalExecutor(model)


def run_stages(
    model: Any, work: Work, output: Path, console: Console | None = None, logs: Path | None = None
) -> Adapters:
    """The adapters of `work`, not yet written to `output`.

    `model` is a transformers causal LM, or the Cluster whose workers have it (without Adam and weighting). Hidden files
    beside `output` hold what a killed run has done; `clean_up` removes them once `output` is written. `logs` is a
    directory for TensorBoard.
    """
    resume = checkpoint.resume_path(output)
    executor = executor_of(model)
    keep = work.recipe is not None
    if work.collects_priors:
        work = replace(work, priors=_prior_stage(executor, work, output, console), collects_priors=False)
    else:  # priors from a file: what is here of a pass for them is another run's
        _set_aside_others([prior_path(output), prior_resume_path(output)], console)
    adapters = _layer_wise_stage(executor, work, output, keep or work.weighting, console)
    if work.weighting:
        adapters = _weighted_stage(model, work, output, keep, console, adapters)
    else:
        _set_aside_others([weighted_path(output)], console)
    if work.recipe is None:
        return adapters
    return_freed()
    with _summary_writer(logs) as writer:
        return executor.end_to_end(work, adapters, resume, console, writer)


def _set_aside_others(paths: Sequence[Path], console: Console | None) -> None:
    """Keep the files that this run does not write: `clean_up` would remove them."""
    for path in filter(Path.exists, paths):
        set_aside(path, OTHER_RUN, console)


def _prior_stage(executor: Executor, work: Work, output: Path, console: Console | None) -> Priors:
    """The priors: those that an earlier run with the same settings left, or new ones."""
    path, resume = prior_path(output), prior_resume_path(output)
    identity = _prior_identity(executor, work)
    found = earlier_stage(path, identity, resume, console)
    if found is not None:
        if console:
            console.print(f"priors: made before, {path}", markup=False)
        return found.prior
    priors = executor.priors(work, resume, console)
    config = adapter_config(work.info, replace(work.method, rank=0), {})
    keep_stage(Adapters(config, {}, {}, priors), path, identity, resume)
    return priors


def _layer_wise_stage(executor: Executor, work: Work, output: Path, keep: bool, console: Console | None) -> Adapters:
    """The layer-wise adapters: those that an earlier run with the same settings left, or new ones."""
    path, resume = layer_wise_path(output), checkpoint.resume_path(output)
    identity = _identity(executor, replace(work, weighting=False))
    found = earlier_stage(path, identity, resume, console)
    if found is not None:
        if console:
            console.print(f"layer-wise stage: done before, {path}", markup=False)
        if not keep and resume.exists():  # of a run that goes on from here, which this one does not
            set_aside(resume, OTHER_RUN, console)
        return found
    adapters = executor.layer_wise(work, resume, console)
    if keep:
        keep_stage(adapters, path, identity, resume)
    return adapters


def _weighted_stage(
    model: Any, work: Work, output: Path, keep: bool, console: Console | None, initial: Adapters
) -> Adapters:
    """The adapters of the weighted closed form: those that an earlier run left, or new ones."""
    path, resume = weighted_path(output), checkpoint.resume_path(output)
    identity = _identity(LocalExecutor(model), work)
    found = earlier_stage(path, identity, resume, console)
    if found is not None:
        if console:
            console.print(f"weighted closed form: done before, {path}", markup=False)
        return found
    return_freed()
    adapters = distill_weighted(model, work.samples, initial, resume, console)
    if keep:
        keep_stage(adapters, path, identity, resume)
    return adapters


@contextlib.contextmanager
def _summary_writer(logs: Path | None) -> Iterator[Any]:
    """A TensorBoard SummaryWriter for the directory `logs`; None without it."""
    if logs is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(logs)) as writer:
        yield writer


def _identity(executor: Executor, work: Work) -> Identity:
    """All that the last layer-wise stage of `work` depends on."""
    method, adam = work.method, work.adam
    settings = selection_settings(method, work.priors)
    settings |= {"rank": method.rank, "solver": asdict(adam) if adam else None, "weighting": work.weighting}
    return stage_identity(executor.fingerprint(work.samples, **settings))


def _prior_identity(executor: Executor, work: Work) -> Identity:
    """All that the priors depend on; another density, prior's weight or core have the same."""
    settings = {"stage": "prior", "score": work.method.score, "layers": list(work.method.layers)}
    return stage_identity(executor.fingerprint(split(work.samples)[0], **settings))
