"""Where a model's parts are once accelerate has spread them (`--device-map`): several GPUs, the CPU's memory, disk.

Parameters that fit on no GPU stay on the CPU or on disk: they are on "meta", without data, except while their module
computes. accelerate's hook on the module knows the device it computes on.
"""

from __future__ import annotations

import contextlib
import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """The device `module` computes on."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def aligned(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which `module`'s own parameters have their data, on the device it computes on."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def return_freed() -> None:
    """Return freed memory of this process to the system.

    glibc keeps freed blocks below 32 MiB, which most moments and activations are. Batches of varying length then leave
    holes that the next batch does not fit, and the process grows to half as much again as it uses.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
