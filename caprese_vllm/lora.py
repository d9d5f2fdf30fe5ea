"""LoRA requests: served everywhere but in replaced FF blocks, whose sparse rows could not follow their adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from caprese_kernels.errors import CapreseError


def load_adapter(original: Callable[..., Any], self: Any, lora_request: Any) -> Any:
    """vLLM's adapter of the request; raises CapreseError, naming a module, when it changes a replaced FF block."""
    adapter = original(self, lora_request)
    ours: Any = getattr(self._adapter_manager.model, "caprese", None)
    if ours is None:
        return adapter
    _, state = ours
    changed = sorted(name for name in adapter.loras if any(ff.block.holds(name) for ff in state.blocks))
    if changed:
        raise CapreseError(
            f"LoRA adapter {lora_request.lora_name}",
            expected="no module in FF blocks that run sparse",
            found=f"{changed[0]} and {len(changed) - 1} more",
            fix="serve one that changes attention only, or choose sparse layers ('layers') that it leaves alone",
        )
    return adapter
