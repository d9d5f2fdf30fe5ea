"""Makes adapters: the low-rank L, R that recover what a sparse FF block loses (arXiv 2505.07861, section 3).

from caprese_distill import DistillConfig, distill

result = distill(DistillConfig(model="Qwen/Qwen2.5-1.5B-Instruct", data="openai/gsm8k:main"))

`apply(model, "adapters.safetensors")` runs a Hugging Face model with one, without vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .applied.sparse_model import SparseModel, apply
    from .config import DistillConfig
    from .job import distill
    from .result import Result

__all__ = ["DistillConfig", "Result", "SparseModel", "apply", "distill"]
_HOMES = {
    "DistillConfig": ".config",
    "Result": ".result",
    "SparseModel": ".applied.sparse_model",
    "apply": ".applied.sparse_model",
    "distill": ".job",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
