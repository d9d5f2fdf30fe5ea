"""One pass of the original model over all samples, with a checkpoint: the moments of every sparse layer's FF block."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor

from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError

from .. import checkpoint
from ..blocks import find_blocks, truncated_decoder
from ..data.batches import BATCH_TOKENS, Batch, make_batches
from ..data.samples import Sample
from ..placement import device_of, return_freed
from ..selection import Priors, selection_settings, selectors_of
from .adam import AdamSettings
from .moments import Moments, Observer, Sink


class TimedPass(checkpoint.BatchPass, Protocol):
    """A pass that counts its seconds, those of earlier runs included."""

    seconds: float


@dataclass
class Pass:
    """The sums of one pass of the original model over all batches, up to batch number `batches`."""

    fit: dict[int, Moments]
    held_out: dict[int, Moments]
    batches: int = 0
    seconds: float = 0.0

    @classmethod
    def begin(cls, devices: Mapping[int, torch.device], depth: int) -> Pass:
        """All zero; `devices` has the device of each layer's moments."""
        fit, held_out = ({i: Moments.zeros(depth, device) for i, device in devices.items()} for _ in range(2))
        return cls(fit, held_out)

    @property
    def position(self) -> str:
        return f"batch {self.batches}"

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        parts = {"fit": self.fit, "held_out": self.held_out}
        tensors = {
            f"{part}.{i}.{f.name}": getattr(moments, f.name)
            for part, by_layer in parts.items()
            for i, moments in by_layer.items()
            for f in fields(Moments)
        }
        return tensors, {"batches": self.batches, "seconds": self.seconds}

    def resume(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        for part, by_layer in (("fit", self.fit), ("held_out", self.held_out)):
            for i, moments in by_layer.items():
                for f in fields(Moments):
                    getattr(moments, f.name).copy_(tensors[f"{part}.{i}.{f.name}"])
        self.batches, self.seconds = progress["batches"], progress["seconds"]


def pass_identity(
    model: Any,
    samples: Sequence[Sample],
    method: Method,
    adam: AdamSettings | None = None,
    priors: Priors | None = None,
) -> dict[str, Any]:
    """All that the sums, or Adam's L and R, depend on: a checkpoint with another identity is not resumed."""
    device = device_of(model.get_input_embeddings())
    settings = selection_settings(method, priors)
    settings["solver"] = "adam" if adam else "closed-form"
    settings |= {"rank": method.rank, "Adam settings": asdict(adam)} if adam else {}
    versions = {"dtype": str(model.dtype), "device": str(device), "torch": torch.__version__}
    return checkpoint.fingerprint(model, samples, **settings, **versions, batch=BATCH_TOKENS[device.type])


@torch.no_grad()
def run_pass(
    model: Any,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    resume: Path | None = None,
    console: Console | None = None,
    priors: Priors | None = None,
) -> Pass:
    """Feed every sample to the original model and sum the moments of the sparse layers' FF blocks.

    `priors` are those that the method needs. With `resume`, the sums are saved to that file every minute or so (less
    often where writing is slow), and a run with the same model, samples and settings continues from there, to the same
    bits.
    """
    identity = prepare_pass(model, samples, info, method, digest=resume is not None, priors=priors)
    device = device_of(model.get_input_embeddings())
    state = Pass.begin(block_devices(model, info, method), info.hidden_size)
    batches = make_batches(samples, device)
    with (
        checkpointed("original model", state, batches, resume, identity, console) as record,
        feeding(model, info, method, priors) as feed,
    ):
        for batch in batches[state.batches :]:
            feed(batch, state.held_out if batch.held_out else state.fit)
            record(1)
    return state


def prepare_pass(
    model: Any,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    digest: bool,
    parts: int = 2,
    priors: Priors | None = None,
) -> dict[str, Any]:
    """Check ids and memory before any work; returns `pass_identity` (empty without `digest`).

    The model's devices are to hold `parts` sets of moments: those fitted and those held out (2), or one of them.
    """
    check_ids(samples, model)
    for device, layers in Counter(block_devices(model, info, method).values()).items():
        _check_memory(parts * layers, info.hidden_size, device)
    return pass_identity(model, samples, method, priors=priors) if digest else {}


@contextlib.contextmanager
def feeding(
    model: Any, info: BaseModelInfo, method: Method, priors: Priors | None = None
) -> Iterator[Callable[[Batch, Mapping[int, Sink]], None]]:
    """Within it, a function that runs the original model over a batch, each layer adding to its sink."""
    blocks = find_blocks(model, info, method.layers)
    selectors = selectors_of(blocks, method, priors)
    with Observer(blocks, selectors) as observer, truncated_decoder(model, method.layers) as decoder:

        def feed(batch: Batch, sinks: Mapping[int, Sink]) -> None:
            observer.expect(batch, sinks)
            decoder(input_ids=batch.ids(), use_cache=False)
            return_freed()

        yield feed


@contextlib.contextmanager
def checkpointed(
    title: str,
    state: TimedPass,
    batches: Sequence[Batch],
    resume: Path | None,
    identity: Mapping[str, Any],
    console: Console | None,
) -> Iterator[Callable[[int], None]]:
    """`checkpoint.checkpointed` for a pass that also counts its seconds."""
    with checkpoint.checkpointed(title, state, batches, resume, identity, console) as record:
        started = time.monotonic() - state.seconds

        def record_with_time(count: int) -> None:
            state.seconds = time.monotonic() - started
            record(count)

        yield record_with_time


def block_devices(model: Any, info: BaseModelInfo, method: Method) -> dict[int, torch.device]:
    """The device on which each sparse layer's FF block computes."""
    return {i: device_of(block) for i, block in find_blocks(model, info, method.layers).items()}


def check_ids(samples: Sequence[Sample], model: Any) -> None:
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
