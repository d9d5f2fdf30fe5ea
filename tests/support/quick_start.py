"""Starts of engines without what vLLM repeats at each of them, as if the process had just been made for it.

An engine of a tiny model then takes 1 s instead of 4 s to start and stop; what it computes is the same.
"""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from vllm.model_executor.models import registry
from vllm.platforms.cpu import CpuPlatform

_frozen_modules = 0
_kernels_registered = False
atexit.register(gc.unfreeze)  # or extension modules report what is frozen as leaked


@contextmanager
def quick_start() -> Iterator[None]:
    """Around the whole life of an engine."""
    with ExitStack() as stack:
        for each in (inspected_in_process(), _imports_frozen(), _kernels_registered_once()):
            stack.enter_context(each)
        yield


@contextmanager
def inspected_in_process() -> Iterator[None]:
    """vLLM inspects an architecture that is new to it in a process of its own, ten seconds each; do it in this one."""
    inspect = registry._ModelInfo.from_model_cls
    with patch.object(registry._LazyRegisteredModel, "inspect_model_cls", lambda self: inspect(self.load_model_cls())):
        yield


@contextmanager
def _imports_frozen() -> Iterator[None]:
    """vLLM collects garbage eight times, 0.3 s each, mostly in looking at what was imported: leave that out.

    It also freezes what an engine has made, and at its end unfreezes everything: neither, or imports would thaw.
    """
    global _frozen_modules
    if len(sys.modules) != _frozen_modules:
        _frozen_modules = len(sys.modules)
        gc.collect()
        gc.freeze()
    with patch.object(gc, "freeze"), patch.object(gc, "unfreeze"):
        yield


@contextmanager
def _kernels_registered_once() -> Iterator[None]:
    """vLLM replaces Triton's kernels in all modules, 0.5 s; the first engine's replacements stay."""
    global _kernels_registered
    with ExitStack() as stack:
        if _kernels_registered:
            stack.enter_context(patch.object(CpuPlatform, "register_triton_kernel_overrides"))
        yield
    _kernels_registered = True
