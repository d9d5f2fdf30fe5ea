"""Layer-wise distillation (paper, section 3.1): one pass of the original model, then the closed form; or Adam's epochs.

In Python, for a transformers causal LM and its tokenizer:

    samples, skipped = encode(ChatRenderer(tokenizer), read_source("math.jsonl").rows, max_length=2048)
    info, method = resolve_method(model.config, "Qwen/Qwen2.5-1.5B-Instruct", "griffin", density=0.5, rank=256)
    distill_layer_wise(model, samples, info, method).save("adapters.safetensors")
    distill_layer_wise(model, samples, info, method, adam=AdamSettings()).save("adapters-adam.safetensors")
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from caprese_kernels.adapters import DTYPES, Adapters
from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError

from ..blocks import adapter_config
from ..checkpoint import CheckpointStore
from ..data.batches import Batch, make_batches, pack
from ..data.samples import Sample, split
from ..placement import device_of
from ..progress import progress_bar
from ..selection import Priors
from .adam import AdamSettings, Descent
from .moments import Moments, Sink
from .passes import Pass, check_ids, feeding, pass_identity, run_pass
from .solve import Solution, solve


@torch.no_grad()
def descend(
    model: Any,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    settings: AdamSettings,
    resume: Path | None = None,
    console: Console | None = None,
    priors: Priors | None = None,
) -> Descent:
    """Train L and R of the sparse layers by Adam on the samples to fit, then sum the errors on all samples.

    A step's samples are fed in batches of BATCH_TOKENS and their gradients added. `resume` as in `run_pass`: a killed
    run continues after the last step in that file, to the same bits.
    """
    device = device_of(model.get_input_embeddings())
    check_ids(samples, model)
    fit, _ = split(samples)
    batches = make_batches(samples, device)
    state = Descent(method.layers, info.hidden_size, method.rank, len(fit), settings, device)
    identity = pass_identity(model, samples, method, settings, priors) if resume else {}
    store = CheckpointStore(state, resume, console, identity)
    started = time.monotonic() - state.seconds
    with progress_bar(console, "tok/s") as bar, feeding(model, info, method, priors) as run:
        total = settings.epochs * sum(len(s.ids) for s in fit) + sum(len(s.ids) for s in samples)
        line = bar.add_task("Adam", total=total, completed=state.tokens, first=state.tokens)

        def feed(batch: Batch, sinks: Mapping[int, Sink]) -> None:
            run(batch, sinks)
            bar.advance(line, batch.num_tokens)
            state.tokens += batch.num_tokens

        while state.step < state.steps:
            step = [fit[i] for i in state.draw()]
            for batch in pack(step, device):
                feed(batch, state.layers)
            remaining = state.update(sum(s.num_rows for s in step))
            bar.update(line, description=f"Adam, epoch {state.epoch} of {settings.epochs}, remaining {remaining:.1%}")
            state.seconds = state.seconds_training = time.monotonic() - started
            store.save_if_due()
        bar.update(line, description="errors")
        residuals = state.residuals(model.dtype)
        for batch in batches[state.batches :]:
            feed(batch, residuals["held_out" if batch.held_out else "fit"])
            state.batches += 1
            state.seconds = time.monotonic() - started
            store.save_if_due()
    return state


def distill_layer_wise(
    model: Any,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    resume: Path | None = None,
    console: Console | None = None,
    adam: AdamSettings | None = None,
    priors: Priors | None = None,
) -> Adapters:
    """Adapters for `model` (a transformers causal LM), in its dtype, by the closed form of eq. 7; with `adam`, by Adam.

    Every layer is fitted on its own, earlier blocks being the original ones. The adapters' `training` entry has the
    samples, tokens, seconds and the errors of each layer (see `Solution`). At least two samples are needed, one of them
    to hold out. `priors` are what the method's prior and core need; the adapters have them.
    """
    check_samples(samples, model.dtype)
    model.eval()
    if adam is None:
        state = run_pass(model, samples, info, method, resume, console, priors)
        work = (state, samples, info, method, model.dtype, console)
        adapters = solve_layers(*work, lambda jobs: itertools.starmap(solve, jobs))
    else:
        descent = descend(model, samples, info, method, adam, resume, console, priors)
        solver = {"solver": "adam", "adam": asdict(adam), "seconds_training": round(descent.seconds_training, 1)}
        adapters = _make_adapters(descent.solutions(model.dtype), samples, info, method, descent.seconds, solver)
    return with_priors(adapters, priors)


def with_priors(adapters: Adapters, priors: Priors | None) -> Adapters:
    """The adapters, and the priors of their layers if there are any."""
    return replace(adapters, prior={i: priors[i] for i in adapters.config.layers} if priors else {})


def check_samples(samples: Sequence[Sample], dtype: torch.dtype) -> None:
    """CapreseError for too few samples, or a model's dtype that adapters cannot have."""
    if len(samples) < 2:
        raise CapreseError("samples", expected="2 or more", found=str(len(samples)), fix="give more data")
    if dtype not in DTYPES:
        raise CapreseError("model", expected=f"one of {DTYPES}", found=str(dtype), fix="load it in another dtype")


def solve_layers(
    state: Pass,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    dtype: torch.dtype,
    console: Console | None,
    solve_all: Callable[[Iterable[tuple[Moments, Moments, int, torch.dtype]]], Iterable[Solution]],
) -> Adapters:
    """Adapters from a finished pass by the closed form; `solve_all` maps `solve` over the layers, in this process or on
    workers."""
    started = time.monotonic()
    jobs = [(state.fit[i], state.held_out[i], method.rank, dtype) for i in method.layers]
    with progress_bar(console, "layers/s") as bar:
        solved = bar.track(solve_all(jobs), total=len(jobs), description="closed form")
        solutions = dict(zip(method.layers, solved, strict=True))
    seconds = time.monotonic() - started
    solver = {"solver": "closed-form", "seconds_solving": round(seconds, 1)}
    return _make_adapters(solutions, samples, info, method, state.seconds + seconds, solver)


def _make_adapters(
    solutions: Mapping[int, Solution],
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    seconds: float,
    solver: Mapping[str, Any],
) -> Adapters:
    numbers = ("ridge", "error_before", "error_after", "remaining", "remaining_fit")
    training = {
        "stage": "layer-wise",
        **solver,
        "samples": len(samples),
        "samples_held_out": len(split(samples)[1]),
        "tokens": sum(s.num_rows for s in samples),
        "seconds": round(seconds, 1),
        "errors": {str(i): {key: getattr(s, key) for key in numbers} for i, s in solutions.items()},
    }
    config = adapter_config(info, method, training)
    return Adapters(config, {i: s.left for i, s in solutions.items()}, {i: s.right for i, s in solutions.items()})
