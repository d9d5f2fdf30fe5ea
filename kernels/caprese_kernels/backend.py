"""One interface to the FF kernels, and the choice of an implementation."""

from __future__ import annotations

import functools
import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from .errors import CapreseError
from .packed import CoreFF, PackedFF

if TYPE_CHECKING:  # config needs pydantic, the kernels do not
    from .config import KernelName


class RowPlan(Protocol):
    """What `Backend.plan_layers` prepares for several layers at once; `plan[i]` is the one of layer i."""

    def __getitem__(self, layer: int) -> RowPlan: ...


class Backend(Protocol):
    """What each implementation offers; a module is one. `reference` defines and documents every function.

    Rows are tokens. `slots` int64 names each token's (or segment's) row of a table, -1 for padding. Tables are
    `keep` [S, F] bool and `tau` [S] float32 of selections, `statistic` [S, F] float32 and `histogram`
    [S, NUM_MAGNITUDES] int64 of prompts in progress. Same inputs give the same bits; nothing is synchronized.

    `out` [T, D] contiguous takes y, which is then `out` itself; None: a new tensor.
    """

    NAME: str

    def dense_ff(self, x: Tensor, ff: PackedFF, out: Tensor | None = None) -> Tensor: ...
    def prompt_ff(
        self, x: Tensor, ff: PackedFF, observed: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None] | None: ...
    def griffin_ff(
        self,
        x: Tensor,
        ff: PackedFF,
        keep: Tensor,
        slots: Tensor,
        row_plan: RowPlan | None = None,
        out: Tensor | None = None,
    ) -> Tensor: ...
    def plan_layers(self, keep: Tensor, slots: Tensor) -> RowPlan | None: ...
    def core_ff(self, x: Tensor, ff: CoreFF, slots: Tensor, out: Tensor | None = None) -> Tensor: ...
    def cats_ff(
        self,
        x: Tensor,
        ff: PackedFF,
        tau: Tensor,
        slots: Tensor,
        out: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    def griffin_norms(self, z: Tensor, scale: Tensor | None = None) -> Tensor: ...
    def griffin_observe(
        self,
        z: Tensor,
        offsets: Tensor,
        slots: Tensor,
        statistic: Tensor,
        norms: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None: ...
    def griffin_select(self, statistic: Tensor, k: int) -> Tensor: ...
    def cats_observe(
        self,
        gate: Tensor,
        activation: str,
        offsets: Tensor,
        slots: Tensor,
        histogram: Tensor,
        scale: Tensor | None = None,
    ) -> None: ...
    def cats_threshold(self, histogram: Tensor, density: float) -> Tensor: ...


def choose(kernel: KernelName, device: torch.device) -> Backend:
    """The implementation called `kernel` for tensors on `device`; "auto" takes the fast one that this machine can run.

    Where there is none, "auto" warns once and takes the reference, which reads every weight. Raises CapreseError for a
    kernel asked for by name that cannot run. The C++ kernels are compiled here, unless the cache has them.
    """
    if kernel == "reference":
        return _reference()
    fits = "cpu" if device.type == "cpu" else "triton"
    wanted = fits if kernel == "auto" else kernel
    reason = _missing(wanted, device)
    if reason is None:
        from . import cpu

        return cast(Backend, cpu) if wanted == "cpu" else _gpu()
    if kernel == "auto":
        _warn_once(f"Caprese: no fast kernels: {reason}. The reference runs instead, which reads every weight")
        return _reference()
    raise CapreseError(
        f"kernel {kernel!r}", expected=f"one that runs on {device.type}", found=reason, fix=f"use 'auto' or {fits!r}"
    )


def _missing(kernel: str, device: torch.device) -> str | None:
    """Why this machine cannot run the kernels on `device`; None if it can."""
    if kernel == "cpu":
        from . import cpu

        if device.type != "cpu":
            return f"tensors on {device.type}"
        try:
            cpu.library()
        except cpu.Unavailable as error:
            return str(error)
        return None
    if find_spec("triton") is None:
        return "no package triton"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return None if device.type == "cuda" or interpreted else f"tensors on {device.type}"


def _reference() -> Backend:
    from . import reference

    return cast(Backend, reference)


def _gpu() -> Backend:
    from . import gpu

    return cast(Backend, gpu)


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("vllm.caprese").warning(message)  # vLLM's handlers show what is below its own name
