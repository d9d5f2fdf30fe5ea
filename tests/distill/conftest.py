"""Data and tiny models for the tests of caprese_distill."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from caprese_distill.data.samples import Sample
from tests.support.models import VOCABULARY

torch.set_num_threads(1)
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def words(count: int, seed: int) -> str:
    return " ".join(NUMBERS[(seed * 7 + i * i + i // 3) % 10] for i in range(count))


def make_rows(count: int, response_words: int = 20) -> list[dict[str, Any]]:
    return [{"prompt": words(5 + i % 7, i), "response": words(response_words + i % 11, i + 100)} for i in range(count)]


def make_samples(count: int, seed: int = 0, longest: int = 40) -> list[Sample]:
    """Random token ids, prompts of 3 to 12 tokens."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for line in range(1, count + 1):
        prompt = int(torch.randint(3, 13, (), generator=draw))
        length = prompt + int(torch.randint(1, longest - 12, (), generator=draw))
        samples.append(Sample(torch.randint(4, VOCABULARY, (length,), generator=draw).int(), prompt, line))
    return samples


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    def write(rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
