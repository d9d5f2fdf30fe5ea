"""Served LoRA's Triton kernels against the reference, interpreted without a GPU; test_served_lora.py runs this file."""

import pytest
import torch

from caprese_bench.lora.served import kernels, triton_kernels
from caprese_kernels import gpu
from tests.support.served_lora import CASES, Problem, assert_near, problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    from tests.support import interpreter

    interpreter.mend()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("planned", [False, True])
def test_the_halves(case: Problem, planned: bool) -> None:
    p = problem(case, DEVICE)
    expected_z, given = kernels.Reference.up(p.x, p.low, p.ff, p.keep, p.slots)
    expected_y = kernels.Reference.down(given, p.ff, p.keep, p.slots)
    more = {"row_plan": gpu.plan_rows(p.keep, p.slots)} if planned else {}
    z, given = triton_kernels.up(p.x, p.low, p.ff, p.keep, p.slots, **more)
    y = triton_kernels.down(given, p.ff, p.keep, p.slots)
    assert_near(z, expected_z, case.dtype)
    assert_near(y, expected_y, case.dtype)
