"""LoRA requests: adapters may change any module but a replaced FF block, whose sparse rows do not apply them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from caprese_kernels.errors import CapreseError

from .state import State


def load_adapter(original: Callable[..., Any], self: Any, lora_request: Any) -> Any:
    """Load the adapter as vLLM does; raises CapreseError, naming a module, if it changes a replaced FF block."""
    adapter = original(self, lora_request)
    state: State | None = getattr(self._adapter_manager.model, "caprese", None)
    if state is None:
        return adapter
    changed = sorted(name for name in adapter.loras if any(ff.block.holds(name) for ff in state.blocks))
    if changed:
        raise CapreseError(
            f"LoRA adapter {lora_request.lora_name}",
            expected="no module in FF blocks that run sparse",
            found=f"{changed[0]} and {len(changed) - 1} more",
            fix="serve one that changes attention only, or choose sparse layers ('layers') that it leaves alone",
        )
    return adapter
