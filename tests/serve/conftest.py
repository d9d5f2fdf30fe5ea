"""Fixtures of the tests of caprese_serve."""

from pathlib import Path

import pytest
import torch

from caprese_kernels.adapters import Adapters
from caprese_kernels.config import AdapterConfig, BaseModelInfo
from tests.support.adapters import BASE


@pytest.fixture
def adapters() -> Adapters:
    """Rank 2 on the first two of four layers; each L R has norm 2: L and R are corners of the identity."""
    config = AdapterConfig(
        base_model=BaseModelInfo.model_validate(BASE),
        method="griffin",
        density=0.5,
        rank=2,
        layers=[0, 1],
        training={"stage": "layer-wise", "samples": 7},
    )
    left, right = torch.eye(8, 2), 2**0.5 * torch.eye(2, 8)
    return Adapters(config, {0: left, 1: left.clone()}, {0: right, 1: right.clone()})


@pytest.fixture
def adapter_file(adapters: Adapters, tmp_path: Path) -> Path:
    path = tmp_path / "adapters.safetensors"
    adapters.save(path)
    return path
