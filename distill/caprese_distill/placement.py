"""Where a model's parts are, when accelerate has spread them (`--device-map`): several GPUs, memory of the CPU, disk.

What does not fit stays on the CPU or on disk, its parameters being on "meta", without data, but for the moment in which
their module computes; accelerate's hook on the module knows where that is.
"""

from __future__ import annotations

import contextlib
import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Where `module` computes."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def aligned(module: nn.Module) -> AbstractContextManager[Any]:
    """Within it, `module`'s own parameters have their data, where it computes."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def return_freed() -> None:
    """Give freed memory of this process back to the system.

    glibc keeps freed blocks below 32 MiB, which are most moments and activations; batches of ever other lengths then
    leave holes that the next does not fit, and a process grows to half as much again as it uses.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
