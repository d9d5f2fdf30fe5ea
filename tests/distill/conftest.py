"""Fixtures for the tests of caprese_distill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.distill import WriteRows

torch.set_num_threads(1)


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """`write_rows(rows)`: the path of a JSONL file of these rows."""

    def write(rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
