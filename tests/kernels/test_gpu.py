"""The Triton backend: by interpreter and compiler on any machine, on the GPU where there is one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from caprese_kernels import reference
from caprese_kernels.backend import Backend, choose
from tests.kernels import conformance
from tests.kernels.cases import Case
from tests.kernels.problem import Problem, problem

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
gpu_only = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU: torch finds none")]


@pytest.mark.parametrize("module", ["gpu_cases", "compile_cases"])
def test_kernels(module: str, tmp_path: Path) -> None:
    """As processes: Triton takes its choice between interpreter and compiler from the environment, when imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    if module == "gpu_cases" and not CUDA:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{module}.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_importing_the_package_leaves_triton_alone() -> None:
    code = "import sys, caprese_kernels.backend, caprese_kernels.reference; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def small_problem(device: str = "cpu", **fields: Any) -> Problem:
    defaults = {"depth": 16, "neurons": 45, "rank": 3, "tokens": 3, "density": 0.5, "dtype": torch.float32}
    return problem(Case(**defaults | {"activation": "silu"} | fields), torch.device(device))


def backend_calls(p: Problem) -> dict[str, tuple[Any, ...]]:
    """Arguments of every function of a backend."""
    device = p.x.device
    offsets, slots = torch.tensor([0, 2, 3], device=device), torch.tensor([1, -1], device=device)
    histogram = torch.zeros(2, reference.NUM_MAGNITUDES, dtype=torch.int64, device=device)
    statistic = torch.rand(2, p.ff.num_neurons, device=device)
    z = torch.rand(3, p.ff.num_neurons, device=device)
    return {
        "dense_ff": (p.x, p.ff),
        "prompt_ff": (p.x, p.ff, True),
        "griffin_ff": (p.x, p.ff, p.keep, p.slots),
        "core_ff": (p.x, p.ff.core(p.case.neurons // 2), p.slots),
        "plan_layers": (p.keep[None], p.slots),
        "cats_ff": (p.x, p.ff, p.tau, p.slots),
        "griffin_norms": (z,),
        "griffin_observe": (z, offsets, slots, statistic),
        "griffin_select": (statistic, 7),
        "cats_observe": (z, "gelu", offsets, slots, histogram),
        "cats_threshold": (histogram + 1, 0.25),
    }


def test_every_function_of_a_backend_has_arguments_here() -> None:
    functions = {name for name in vars(Backend) if not name.startswith("_")}
    calls = backend_calls(small_problem())
    assert set(calls) == functions
    for name, arguments in calls.items():
        getattr(reference, name)(*arguments)


class TestOnGpu:
    pytestmark = gpu_only

    @pytest.mark.parametrize("tokens", [1, 2, 4, 16, 64])
    @pytest.mark.parametrize("path", ["gather", "masked"])
    def test_real_shapes(self, tokens: int, path: str) -> None:
        """Llama 3.1 8B's block, selections that differ from token to token."""
        from tests.kernels.gpu_cases import BACKENDS

        case = Case(4096, 14336, 256, tokens, 0.5, torch.bfloat16, "silu", seed=9000 + tokens)
        conformance.check_griffin(BACKENDS[path], torch.device("cuda"), case)
        conformance.check_cats(BACKENDS[path], torch.device("cuda"), case)

    @pytest.mark.parametrize("tokens", [1, 5, 16])
    def test_selection_of_many_neurons(self, tokens: int) -> None:
        from caprese_kernels import gpu

        statistic = torch.rand(tokens, 28672, device="cuda").bfloat16().float()  # many ties
        for k in (0, 1, 14336, 28672):
            assert torch.equal(gpu.griffin_select(statistic, k), reference.griffin_select(statistic, k))

    def test_statistics_of_a_real_prompt(self) -> None:
        from caprese_kernels import gpu

        z = torch.randn(2048, 18944, device="cuda").bfloat16()
        offsets, slots = torch.tensor([0, 700, 2048], device="cuda"), torch.tensor([1, 0], device="cuda")
        found = torch.zeros(2, 18944, device="cuda")
        gpu.griffin_observe(z, offsets, slots, found)
        squares = z.double().square()
        shares = squares / squares.sum(dim=1, keepdim=True)
        wanted = torch.stack([shares[700:].sum(dim=0), shares[:700].sum(dim=0)]).float()
        # Some 50 roundings in a norm (a thread's 19 to 37 squares, then a tree), 16 in a block, 9 over 85 blocks, and a
        # handful in a share; each at most 2^-24 of terms that are all positive.
        torch.testing.assert_close(found, wanted, rtol=100 * 2**-24, atol=0)
        counted, expected = (
            torch.zeros(2, reference.NUM_MAGNITUDES, dtype=torch.int64, device="cuda") for _ in range(2)
        )
        gpu.cats_observe(z, "relu", offsets, slots, counted)
        reference.cats_observe(z, "relu", offsets, slots, expected)
        assert torch.equal(counted, expected)

    @pytest.mark.parametrize("tokens", [1, 2, 4, 32])
    def test_cuda_graph(self, tokens: int) -> None:
        """One capture serves other tokens, slots, selections and thresholds: the same bits as without a graph."""
        from caprese_kernels import gpu

        p = small_problem("cuda", depth=256, neurons=512, tokens=tokens, dtype=torch.bfloat16)
        q = small_problem("cuda", depth=256, neurons=512, tokens=tokens, dtype=torch.bfloat16, seed=1, padding="last")
        x, slots, keep, tau = p.x.clone(), p.slots.clone(), p.keep.clone(), p.tau.clone()

        def step() -> tuple[Tensor, ...]:
            return gpu.griffin_ff(x, p.ff, keep, slots), *gpu.cats_ff(x, p.ff, tau, slots)

        self.check_graph(step, [(x, q.x), (slots, q.slots), (keep, q.keep), (tau, q.tau)])

    def test_cuda_graph_of_statistics(self) -> None:
        from caprese_kernels import gpu

        z, other = torch.randn(2, 40, 64, device="cuda").bfloat16().unbind()
        offsets, slots = torch.tensor([0, 9, 40], device="cuda"), torch.tensor([1, 0], device="cuda")
        borders = torch.tensor([0, 33, 38], device="cuda")

        def step() -> tuple[Tensor, ...]:
            statistic = torch.zeros(2, 64, device="cuda")
            histogram = torch.zeros(2, reference.NUM_MAGNITUDES, dtype=torch.int64, device="cuda")
            gpu.griffin_observe(z, offsets, slots, statistic)
            gpu.cats_observe(z, "silu", offsets, slots, histogram)
            return statistic, histogram, gpu.griffin_select(statistic, 32), gpu.cats_threshold(histogram, 0.5)

        self.check_graph(step, [(z, other), (offsets, borders), (slots, -slots)])

    def check_graph(self, step: Callable[[], tuple[Tensor, ...]], changes: list[tuple[Tensor, Tensor]]) -> None:
        step()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()
        for _ in range(2):
            for _ in range(3):
                for output in outputs:
                    output.fill_(1)
                graph.replay()
            for found, wanted in zip(outputs, step(), strict=True):
                assert torch.equal(found, wanted)
            for tensor, value in changes:
                tensor.copy_(value)

    def test_nothing_synchronizes(self) -> None:
        from caprese_kernels import gpu

        calls = backend_calls(small_problem("cuda"))
        for run in range(2):
            torch.cuda.set_sync_debug_mode("error" if run else "default")  # what the first run compiles may wait
            try:
                for name, arguments in calls.items():
                    getattr(gpu, name)(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_auto_takes_the_triton_kernels(self) -> None:
        assert choose("auto", torch.device("cuda")).NAME == "triton"
