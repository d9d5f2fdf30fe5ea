"""Layer-wise distillation (paper, section 3.1): one pass of the original model, then the closed form.

In Python, for a transformers causal LM and its tokenizer:

    samples, skipped = encode(tokenizer, read_rows(Path("math.jsonl")), max_length=2048)
    info, method = plan(model.config, "Qwen/Qwen2.5-1.5B-Instruct", "griffin", density=0.5, rank=256)
    distill_layer_wise(model, samples, info, method).save("adapters.safetensors")
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from caprese_kernels.adapters import DTYPES, Adapters
from caprese_kernels.config import AdapterConfig, BaseModelInfo, Method
from caprese_kernels.errors import CapreseError

from . import checkpoint
from .blocks import find_blocks
from .data import Sample, split
from .moments import Batch, Moments, Observer
from .placement import device_of
from .progress import progress_bar
from .solve import Solution, solve

# Tokens of a forward pass, padding included (a longer sample runs alone): enough to fill the
# device, and on a CPU few enough that a checkpoint comes every minute.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
CHECKPOINT_SECONDS = 60.0


@dataclass
class Pass:
    """The sums of one pass of the original model over all batches, as far as it has come."""

    fit: dict[int, Moments]
    held_out: dict[int, Moments]
    batches: int = 0  # done
    seconds: float = 0.0

    @classmethod
    def begin(cls, devices: Mapping[int, torch.device], depth: int) -> Pass:
        """Zeros; `devices` tells where each layer's moments are kept."""
        fit, held_out = ({i: Moments.zeros(depth, device) for i, device in devices.items()} for _ in range(2))
        return cls(fit, held_out)

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        parts = {"fit": self.fit, "held_out": self.held_out}
        tensors = {
            f"{part}.{i}.{f.name}": getattr(moments, f.name)
            for part, by_layer in parts.items()
            for i, moments in by_layer.items()
            for f in fields(Moments)
        }
        checkpoint.save(path, tensors, {"batches": self.batches, "seconds": self.seconds}, identity)

    def resume(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        for part, by_layer in (("fit", self.fit), ("held_out", self.held_out)):
            for i, moments in by_layer.items():
                for f in fields(Moments):
                    getattr(moments, f.name).copy_(tensors[f"{part}.{i}.{f.name}"])
        self.batches, self.seconds = progress["batches"], progress["seconds"]


def make_batches(samples: Sequence[Sample], device: torch.device) -> list[Batch]:
    """Batches of samples of like length, the longest first (what does not fit fails at once); then those held out."""
    batches: list[Batch] = []
    for held_out, part in enumerate(split(samples)):
        pending: list[Sample] = []
        for sample in sorted(part, key=lambda s: -len(s.ids)):
            if pending and len(pending[0].ids) * (len(pending) + 1) > BATCH_TOKENS[device.type]:
                batches.append(Batch(pending, bool(held_out), device))
                pending = []
            pending.append(sample)
        batches.append(Batch(pending, bool(held_out), device))
    return batches


@torch.no_grad()
def run_pass(
    model: Any,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    resume: Path | None = None,
    console: Console | None = None,
) -> Pass:
    """Feed every sample to the original model and sum the moments of the sparse layers' FF blocks.

    With `resume`, the sums go to that file every minute or so (less often where writing is slow),
    and a run whose model, samples and settings are the same starts from there, to the same bits.
    """
    identity = prepare(model, samples, info, method, digest=resume is not None)
    device = device_of(model.get_input_embeddings())
    state = Pass.begin(_devices(model, info, method), info.hidden_size)
    batches = make_batches(samples, device)
    with recorded(state, batches, resume, identity, console) as record, feeding(model, info, method) as feed:
        for batch in batches[state.batches :]:
            feed(batch, state.held_out if batch.held_out else state.fit)
            record(1)
    return state


def _devices(model: Any, info: BaseModelInfo, method: Method) -> dict[int, torch.device]:
    return {i: device_of(block) for i, block in find_blocks(model, info, method.layers).items()}


def prepare(
    model: Any, samples: Sequence[Sample], info: BaseModelInfo, method: Method, digest: bool, parts: int = 2
) -> dict[str, Any]:
    """Refuse what cannot work before any work; what the moments depend on (empty without `digest`).

    `parts` sets of moments are to be on the model's device: those fitted and those held out, or one of the two.
    """
    device = device_of(model.get_input_embeddings())
    _check_ids(samples, model)
    for place, count in Counter(_devices(model, info, method).values()).items():
        _check_memory(parts * count, info.hidden_size, place)
    if not digest:
        return {}
    settings = {"method": method.name, "density": method.density, "layers": list(method.layers)}
    versions = {"dtype": str(model.dtype), "device": str(device), "torch": torch.__version__}
    return checkpoint.fingerprint(model, samples, **settings, **versions, batch=BATCH_TOKENS[device.type])


@contextlib.contextmanager
def feeding(
    model: Any, info: BaseModelInfo, method: Method
) -> Iterator[Callable[[Batch, Mapping[int, Moments]], None]]:
    """A function that runs the original model over a batch and adds to the moments given with it."""
    blocks = find_blocks(model, info, method.layers)
    with Observer(blocks, method) as observer, _shortened(model, method) as decoder:

        def feed(batch: Batch, moments: Mapping[int, Moments]) -> None:
            observer.expect(batch, moments)
            decoder(input_ids=batch.ids(), use_cache=False)

        yield feed


@contextlib.contextmanager
def recorded(
    state: Pass,
    batches: Sequence[Batch],
    resume: Path | None,
    identity: dict[str, Any],
    console: Console | None,
) -> Iterator[Callable[[int], None]]:
    """Bring `state` to where the checkpoint left it; then a function to call whenever `count` more batches are in it,
    for progress and the next checkpoint."""
    if resume is not None and resume.exists():
        found = checkpoint.load(resume, identity)
        if isinstance(found, str):
            told = f"{found}; starting anew"
        else:
            state.resume(*found)
            told = f"going on after batch {state.batches} of {len(batches)}"
        if console:
            console.print(f"checkpoint {resume}: {told}")
    started, saved, cost = time.monotonic() - state.seconds, time.monotonic(), 0.0
    with progress_bar(console, "tok/s") as bar:
        done = sum(b.num_tokens for b in batches[: state.batches])
        line = bar.add_task("original model", total=sum(b.num_tokens for b in batches), completed=done, first=done)

        def record(count: int) -> None:
            nonlocal saved, cost
            bar.advance(line, sum(b.num_tokens for b in batches[state.batches : state.batches + count]))
            state.batches += count
            state.seconds = time.monotonic() - started
            now = time.monotonic()
            if resume and now - saved >= max(CHECKPOINT_SECONDS, 10 * cost):
                state.save(resume, identity)
                saved = time.monotonic()
                cost = saved - now

        yield record


def distill_layer_wise(
    model: Any,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    resume: Path | None = None,
    console: Console | None = None,
) -> Adapters:
    """Adapters for `model` (a transformers causal LM) by the closed form of eq. 7, in the model's dtype.

    Every layer is fitted on its own, earlier blocks being the original ones. The adapters' `training`
    entry tells samples, tokens, seconds and the errors of each layer (see `Solution`). Two samples
    or more are needed, one of them to hold out.
    """
    check(samples, model.dtype)
    model.eval()
    state = run_pass(model, samples, info, method, resume, console)
    return close(state, samples, info, method, model.dtype, console, lambda jobs: itertools.starmap(solve, jobs))


def check(samples: Sequence[Sample], dtype: torch.dtype) -> None:
    """CapreseError where samples are too few, or adapters cannot have the model's dtype."""
    if len(samples) < 2:
        raise CapreseError("samples", expected="2 or more", found=str(len(samples)), fix="give more data")
    if dtype not in DTYPES:
        raise CapreseError("model", expected=f"one of {DTYPES}", found=str(dtype), fix="load it in another dtype")


def close(
    state: Pass,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    dtype: torch.dtype,
    console: Console | None,
    solve_all: Callable[[Iterable[tuple[Moments, Moments, int, torch.dtype]]], Iterable[Solution]],
) -> Adapters:
    """Adapters from a finished pass; `solve_all` maps `solve` over the layers, here or elsewhere."""
    started = time.monotonic()
    jobs = [(state.fit[i], state.held_out[i], method.rank, dtype) for i in method.layers]
    with progress_bar(console, "layers/s") as bar:
        solved = bar.track(solve_all(jobs), total=len(jobs), description="closed form")
        solutions = dict(zip(method.layers, solved, strict=True))
    numbers = ("ridge", "error_before", "error_after", "remaining", "remaining_fit")
    first = method.layers[0]  # every layer sees the same tokens
    training = {
        "stage": "layer-wise",
        "solver": "closed-form",
        "samples": len(samples),
        "samples_held_out": len(split(samples)[1]),
        "tokens": int(state.fit[first].rows + state.held_out[first].rows),
        "seconds": round(state.seconds + time.monotonic() - started, 1),
        "errors": {str(i): {key: getattr(s, key) for key in numbers} for i, s in solutions.items()},
    }
    config = AdapterConfig(
        base_model=info,
        method=method.name,
        density=method.density,
        rank=method.rank,
        layers=list(method.layers),
        training=training,
    )
    return Adapters(config, {i: s.left for i, s in solutions.items()}, {i: s.right for i, s in solutions.items()})


@contextlib.contextmanager
def _shortened(model: Any, method: Method) -> Iterator[nn.Module]:
    """The decoder up to the last sparse layer: what comes after it changes nothing here."""
    decoder = model.get_decoder()
    layers = decoder.layers
    decoder.layers = layers[: max(method.layers) + 1]
    try:
        yield decoder
    finally:
        decoder.layers = layers


def _check_ids(samples: Sequence[Sample], model: Any) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    for sample in samples:
        largest = int(sample.ids.max())
        if largest >= size:
            raise CapreseError(
                "tokenizer",
                expected=f"token ids below {size}, the model's vocabulary",
                found=f"{largest} in the sample of line {sample.line}",
                fix="use the model's own tokenizer",
            )


def _check_memory(moments: int, depth: int, device: torch.device) -> None:
    needed = 2 * 8 * depth * depth * moments  # X'X and X'E in float64
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise CapreseError(
            "device memory",
            expected=f"{needed / 2**30:.1f} GiB for {moments} sums of moments",
            found=f"{free / 2**30:.1f} GiB free",
            fix="use fewer --layers, or --device cpu",
        )
