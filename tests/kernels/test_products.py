"""The path of many tokens: batches of several blocks of tokens, sums of several parts, any number of threads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from caprese_kernels import cpu
from tests.kernels import conformance, shared_core
from tests.kernels.cases import INTEGERS, Case
from tests.kernels.problem import assert_same_bits, problem

CPU = torch.device("cpu")
MARCHES = {"native": "avx2", "cooperlake": "avx512_bf16", "x86-64-v4": "avx512bw", "x86-64-v3": "avx2"}
# More tokens than products.cpp takes at once (BLOCK), more neurons than it adds up at once (DEPTH).
LARGE = [
    Case(100, 45, 16, 601, 0.5, torch.bfloat16, "silu", biased=True, layout="columns", padding="middle"),
    Case(64, 1100, 32, 70, 0.5, torch.bfloat16, "silu", table="mixed"),
    Case(64, 1056, 0, 33, 0.5, torch.bfloat16, INTEGERS, gated=False),
    Case(129, 700, 7, 300, 0.25, torch.float32, "gelu_pytorch_tanh", padding="first"),
    Case(96, 530, 16, 50, 0.5, torch.float32, "silu", gated=False, biased=True),
    Case(96, 530, 16, 50, 0.5, torch.float16, "silu", biased=True),
]
CHECKS = (
    conformance.check_dense,
    conformance.check_griffin,
    conformance.check_cats,
    conformance.check_padding,
    shared_core.check_core,
)


@pytest.fixture(params=MARCHES)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The C++ kernels for that processor, taking this path whatever the batch."""
    if not shutil.which(os.environ.get("CXX") or "g++"):
        pytest.skip("needs a C++ compiler: $CXX or g++")
    if MARCHES[request.param] not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this processor has no {MARCHES[request.param]}")
    library = cpu.library(request.param)
    monkeypatch.setattr(cpu, "library", lambda: library)
    for name in ("GATHER_UP_TO", "CORE_GATHER_UP_TO", "SHARED_UNION"):
        monkeypatch.setattr(cpu, name, -1)
    return cpu


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_large(kernels: Any, case: Case) -> None:
    for check in CHECKS:
        check(kernels, CPU, case)
    conformance.check_request_stands_alone(kernels, CPU, case, same_bits=True)


@pytest.mark.parametrize("case", LARGE[:4], ids=lambda case: case.id)
def test_bits_do_not_depend_on_the_number_of_threads(kernels: Any, case: Case) -> None:
    p = problem(case, CPU)
    wanted = kernels.griffin_ff(p.x, p.ff, p.keep, p.slots)
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)  # conftest.py sets it back
        assert_same_bits(kernels.griffin_ff(p.x, p.ff, p.keep, p.slots), wanted, f"y of {threads} threads")
