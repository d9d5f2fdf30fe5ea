"""Whether an error says that memory ran out."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, torch's on a CPU (a RuntimeError that says so), or Python's."""
    said = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, (RuntimeError, OSError))
        and ("can't allocate memory" in said or "Cannot allocate memory" in said)
    )
