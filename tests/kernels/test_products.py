"""The path of many tokens: batches of several blocks of tokens, sums of several parts, any number of threads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from caprese_kernels import cpu, reference
from caprese_kernels.packed import PackedFF
from tests.kernels import conformance, shared_core
from tests.kernels.cases import INTEGERS, Case
from tests.kernels.problem import assert_output, assert_same_bits, problem

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


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_prompts_hand_back_what_their_statistic_needs(kernels: Any, case: Case) -> None:
    """y, z and what goes into the activation follow their definitions; without them y has the same bits, as it has
    for every part of the prompt."""
    p = problem(case, CPU)
    y, z, gate = kernels.prompt_ff(p.x, p.ff, observed=True)
    assert_output(y, p.dense(), p, "y of a prompt")
    assert_same_bits(kernels.prompt_ff(p.x, p.ff, observed=False)[0], y, "y of a prompt without its statistic")
    rows, bias = (p.ff.up_plus, p.ff.up_bias) if p.ff.gate is None else (p.ff.gate, p.ff.gate_bias)
    wanted_gate = F.linear(
        p.x.contiguous().float(), rows[: p.ff.num_neurons].float(), None if bias is None else bias.float()
    )
    tolerance = 0.02 if case.dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(
        gate.float(), wanted_gate, rtol=tolerance, atol=tolerance * float(wanted_gate.abs().max())
    )
    _, wanted_z = reference.activations(p.x.float(), widened(p.ff))
    torch.testing.assert_close(z.float(), wanted_z, rtol=tolerance, atol=tolerance * float(wanted_z.abs().max()))
    half = len(p.x) // 2
    for part in (slice(half), slice(half, None)):
        for found, whole in zip(kernels.prompt_ff(p.x[part], p.ff, observed=True), (y, z, gate), strict=True):
            assert_same_bits(found, whole[part], "part of a prompt")


def widened(ff: PackedFF) -> PackedFF:
    """The same block in float32."""
    biases = (None if bias is None else bias.float() for bias in (ff.gate_up_bias, ff.down_bias))
    return PackedFF(ff.gate_up_plus.float(), ff.down_plus.float(), ff.activation, ff.rank, *biases)


@pytest.mark.parametrize("case", LARGE[:4], ids=lambda case: case.id)
def test_bits_do_not_depend_on_the_number_of_threads(kernels: Any, case: Case) -> None:
    p = problem(case, CPU)
    wanted = kernels.griffin_ff(p.x, p.ff, p.keep, p.slots)
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)  # conftest.py sets it back
        assert_same_bits(kernels.griffin_ff(p.x, p.ff, p.keep, p.slots), wanted, f"y of {threads} threads")
