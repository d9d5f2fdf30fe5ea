"""What packing a model's weights leaves allocated."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from caprese_kernels.config import Method
from caprese_vllm import blocks


@pytest.mark.parametrize(("cuda", "layers", "releases"), [(True, 9, [4, 8]), (True, 3, []), (False, 9, [])])
def test_freed_weights_go_back_every_few_blocks(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, layers: int, releases: list[int]
) -> None:
    """torch would keep them beside the packed ones: another size, so another place."""
    packed: list[int] = []
    found: list[int] = []
    layer = SimpleNamespace(weight=SimpleNamespace(is_cuda=cuda), tp_rank=0, tp_size=1)

    def repack(*arguments: Any) -> None:
        packed.append(len(packed))

    monkeypatch.setattr(blocks, "find_block", lambda *arguments: SimpleNamespace(up=layer, down=layer))
    monkeypatch.setattr(blocks, "_repack", repack)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(len(packed)))
    model: Any = None
    served: Any = None
    assert len(blocks.pack_blocks(model, Method("cats", 0.5, tuple(range(layers)), 0), range(layers), served)) == layers
    assert found == releases
