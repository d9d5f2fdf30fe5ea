"""Checkpoints of a run: tensors and progress in one safetensors file, which appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from caprese_kernels import files
from caprese_kernels.errors import CapreseError

from .data.batches import Batch
from .data.samples import Sample
from .kept import kept_files, set_aside, take_back
from .placement import aligned
from .progress import note, progress_bar

CHECKPOINT_SECONDS = 60.0
_UNREADABLE = "it cannot be read"
# What a damaged or foreign file can raise while it is read.
_READ_ERRORS = (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError)
_SUMMED = 2**22  # weights summed at a time: on a CPU torch copies them to float64


def resume_path(output: Path) -> Path:
    """The checkpoint beside the adapter `output`."""
    return output.with_name(f".{output.name}.resume")


def fingerprint(model: nn.Module, samples: Sequence[Sample], **settings: Any) -> dict[str, Any]:
    """What the moments depend on: the model's weights, the token ids, and `settings` (JSON values).

    A weight counts by its float64 sum, which tells models apart without hashing gigabytes.
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


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes and values."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype}".encode() + tensor.float().cpu().numpy().tobytes())
    return found.hexdigest()


def save(path: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write tensors, progress and identity; CapreseError where the file cannot be written."""
    header = {"identity": json.dumps(identity), "progress": json.dumps(progress)}
    try:
        with files.staged(path) as new:
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, new, metadata=header)
    except (OSError, SafetensorError) as error:
        size = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**30
        raise CapreseError(
            f"checkpoint {path}",
            expected=f"room for {size:.1f} GiB beside the output",
            found=files.reason(error) if isinstance(error, OSError) else str(error),
            fix="free some space, or choose another output",
        ) from None


def load(path: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | str:
    """Tensors and progress; or, as a string, why this run cannot use the file."""
    try:
        with _open(path) as file:
            progress = _progress(file, identity)
            if isinstance(progress, str):
                return progress
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, progress
    except _READ_ERRORS as error:
        return f"{_UNREADABLE} ({type(error).__name__})"


def load_progress(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The progress alone; None where this run cannot use the file, or there is none."""
    try:
        with _open(path) as file:
            progress = _progress(file, identity)
    except _READ_ERRORS:
        return None
    return None if isinstance(progress, str) else progress


def find_progress(path: Path, identify: Callable[[], Mapping[str, Any]]) -> tuple[Path, dict[str, Any]] | None:
    """This run's checkpoint, at `path` or kept beside it, and its progress; None without one.

    `identify`, which reads all weights, is called only where there is a file.
    """
    there = [each for each in (path, *kept_files(path)) if each.exists()]
    identity = identify() if there else {}
    for each in there:
        progress = load_progress(each, identity)
        if progress is not None:
            return each, progress
    return None


def header_digest(path: Path) -> str | None:
    """SHA-256 of a checkpoint's identity and progress; None where no file can be read."""
    try:
        with _open(path) as file:
            return hashlib.sha256(json.dumps(file.metadata(), sort_keys=True).encode()).hexdigest()
    except _READ_ERRORS:
        return None


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The open file as safetensors reads it: a regular one, which cannot be exchanged between two reads."""
    with files.open_regular(path) as file, safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt") as tensors:
        yield tensors


def _progress(file: Any, identity: Mapping[str, Any]) -> dict[str, Any] | str:
    header = file.metadata() or {}
    found = json.loads(header["identity"])
    other = [key for key, value in identity.items() if found.get(key) != value]
    return f"it belongs to a run with other {', '.join(other)}" if other else dict(json.loads(header["progress"]))


def remove(path: Path) -> None:
    """Remove the checkpoint, and what a kill during a write left of it."""
    files.remove(path)


class Resumable(Protocol):
    """Work in progress that a checkpoint can hold."""

    @property
    def position(self) -> str:
        """How far it has come, for a message: "step 3 of 8"."""
        ...

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and progress (JSON values)."""
        ...

    def resume(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Take the state of a snapshot."""
        ...


class BatchPass(Resumable, Protocol):
    """A pass over batches; `batches` is how many it has done."""

    batches: int


class CheckpointStore:
    """Restores `state` from the checkpoint at `path` if it belongs to this run, and writes it there as work goes on.

    A checkpoint of another run is kept beside it, as `kept.set_aside` does.

    Without a `path`, it does nothing.
    """

    def __init__(
        self,
        state: Resumable,
        path: Path | None,
        console: Console | None,
        identity: Mapping[str, Any],
    ):
        self.state, self.path, self.identity = state, path, identity
        if path:
            take_back(path, lambda each: load_progress(each, self.identity) is not None, console)
        if path and path.exists():
            found = load(path, self.identity)
            if not isinstance(found, str):
                state.resume(*found)
                outcome = f"going on after {state.position}"
            else:
                outcome = f"{found}; starting anew"
                if not found.startswith(_UNREADABLE):
                    set_aside(path, outcome, console)
            if path.exists():
                note(console, f"{path}: {outcome}")
        self.last_save, self.save_seconds = time.monotonic(), 0.0

    def save_if_due(self) -> None:
        """Save every CHECKPOINT_SECONDS, less often where writing is slow: at most a tenth of the time goes to it."""
        now = time.monotonic()
        if self.path and now - self.last_save >= max(CHECKPOINT_SECONDS, 10 * self.save_seconds):
            save(self.path, *self.state.snapshot(), self.identity)
            self.last_save = time.monotonic()
            self.save_seconds = self.last_save - now


@contextmanager
def checkpointed(
    title: str,
    state: BatchPass,
    batches: Sequence[Batch],
    resume: Path | None,
    identity: Mapping[str, Any],
    console: Console | None,
) -> Iterator[Callable[[int], None]]:
    """Restore `state` from its checkpoint. Within it, a function to call whenever `count` more batches are in `state`:
    it advances the progress bar `title` and saves the next checkpoint."""
    store = CheckpointStore(state, resume, console, identity)
    with progress_bar(console, "tok/s") as bar:
        done = sum(b.num_tokens for b in batches[: state.batches])
        line = bar.add_task(title, total=sum(b.num_tokens for b in batches), completed=done, first=done)

        def record(count: int) -> None:
            bar.advance(line, sum(b.num_tokens for b in batches[state.batches : state.batches + count]))
            state.batches += count
            store.save_if_due()

        yield record
