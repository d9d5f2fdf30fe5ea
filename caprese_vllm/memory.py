"""Memory that Caprese takes beside a model's own weights, and the error where there is not enough."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch

from caprese_kernels.config import BaseModelInfo
from caprese_kernels.errors import CapreseError
from caprese_kernels.memory import out_of_memory

from .settings import EngineSettings
from .statistics import page_dtype, page_width


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that one process keeps from start-up on, for its N sparse layers and its F neurons of each.

    low_rank  L and R: 2 N r D values of the model's dtype, r rounded up to a multiple of the tensor-parallel size
    tables    of each of S requests at once: GRIFFIN's masks, N S F bytes, or CATS's thresholds, 4 N S; where requests
              reselect, also N S statistics
    pages     N statistics for each page of the prefix cache
    """

    low_rank: int
    tables: int
    pages: int
    requests: int  # S
    num_pages: int

    @classmethod
    def of(cls, vllm_config: Any, settings: EngineSettings, served: BaseModelInfo, num_layers: int) -> MemoryNeeds:
        """Of a process that has `num_layers` of the sparse layers."""
        method, model = settings.method, vllm_config.model_config
        ranks, slots = vllm_config.parallel_config.tensor_parallel_size, vllm_config.scheduler_config.max_num_seqs
        neurons = served.intermediate_size // ranks
        statistic = page_width(method, neurons) * page_dtype(method, neurons, model.max_model_len).itemsize
        selection = 4 if method.name == "cats" else neurons if method.needs_statistic else 0
        kept = 0 if settings.reselect_interval is None else statistic
        return cls(
            low_rank=2 * num_layers * -(-method.rank // ranks) * served.hidden_size * model.dtype.itemsize,
            tables=num_layers * slots * (selection + kept),
            pages=num_layers * settings.num_pages * statistic,
            requests=slots,
            num_pages=settings.num_pages,
        )

    def __str__(self) -> str:
        parts = {
            "L and R": self.low_rank,
            f"tables of {self.requests} requests": self.tables,
            f"{self.num_pages} pages of statistics": self.pages,
        }
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"{sum(parts.values()) / 2**30:.2f} GiB ({listed})"

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """Raise CapreseError for an allocation that is refused within it, with these numbers and what to lower."""
        try:
            yield
        except Exception as error:
            if not out_of_memory(error):
                raise
            found = shorten(str(error), 250) or type(error).__name__
            raise CapreseError(
                "device memory" if isinstance(error, torch.OutOfMemoryError) else "memory",
                expected=f"beside the model's weights {self}",
                found=found,
                fix="lower --max-num-seqs (tables) or statistics_mib of --caprese-config (pages), free memory that "
                "others use, or divide the model by --tensor-parallel-size",
            ) from None
