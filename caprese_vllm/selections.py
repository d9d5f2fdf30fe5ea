"""What `show_selections` adds: the neurons that a request selected, for GET /caprese/selections/ID.

A request is found by its id alone, which vLLM draws at random and sends to its client with the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BINS = 128  # of a layer's neurons, over all ranks
RECENT = 64  # finished requests whose selections are kept


class RecentSelections:
    """The selections of the requests that finished last: State.table[:, slot] of each."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def add(self, request_id: str, selection: Tensor) -> None:
        """Keep a selection, and drop the oldest of more than RECENT."""
        self._kept[request_id] = selection
        if len(self._kept) > RECENT:
            del self._kept[next(iter(self._kept))]

    def find(self, name: str) -> Tensor | None:
        """The selection of the request that its client knows as `name`."""
        request_id = find_named(self._kept, name)
        return None if request_id is None else self._kept[request_id]


def find_named(request_ids: Iterable[str], name: str) -> str | None:
    """The engine's id of the request that its client knows as `name`: the whole name, and what vLLM adds to it.

    vLLM appends a dash and eight hexadecimal digits, and puts "0_" in front of the first of n samples.
    """
    whole = re.compile(rf"(0_)?{re.escape(name)}(-[0-9a-f]{{8}})?")
    return next((request_id for request_id in request_ids if whole.fullmatch(request_id)), None)


def binned(mask: Tensor, bins: int) -> list[float]:
    """The share of true entries in each of at most `bins` equal parts of a mask, bool [F]."""
    bins = max(1, min(bins, len(mask)))
    part = torch.arange(len(mask), device=mask.device) * bins // len(mask)
    sizes = torch.bincount(part, minlength=bins)
    return (torch.bincount(part, mask.float(), minlength=bins) / sizes).tolist()


def merge_selections(parts: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """One answer from every rank's part (`State.selections`); None where none knows the request.

    The ranks that share a layer hold consecutive neurons of it: their bins are joined in the order of ranks, and the
    numbers of their neurons added. A threshold is the same on all of them.
    """
    known = sorted((part for part in parts if part is not None), key=lambda part: part["rank"])
    if not known:
        return None
    layers: dict[int, dict[str, Any]] = {}
    for part in known:
        for layer, shown in part["layers"].items():
            whole = layers.setdefault(layer, {"layer": layer})
            for name, value in shown.items():
                whole[name] = value if name == "threshold" or name not in whole else whole[name] + value
    return {"method": known[0]["method"], "layers": [layers[layer] for layer in sorted(layers)]}
