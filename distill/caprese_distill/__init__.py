"""Makes adapters: the low-rank L, R that recover what a sparse FF block loses (arXiv 2505.07861, section 3).

from caprese_distill import DistillConfig, distill

result = distill(DistillConfig(model="Qwen/Qwen2.5-1.5B-Instruct", data="openai/gsm8k:main"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DistillConfig
    from .job import distill
    from .result import Result

__all__ = ["DistillConfig", "Result", "distill"]
_HOMES = {"DistillConfig": ".config", "Result": ".result", "distill": ".job"}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
