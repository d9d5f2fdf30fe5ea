"""The CUDA kernel that counts CATS's magnitudes, on any machine: compiled as C++, it must do what a backend does."""

import ctypes
import functools
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from caprese_kernels.gpu import histogram, nvrtc
from caprese_kernels.gpu.histogram import Variant
from caprese_kernels.reference import NUM_MAGNITUDES
from tests.kernels import observation, scaled
from tests.kernels.cases import SMALL, Case

SHIM = Path(__file__).with_name("cuda_shim.h")
THREADS, BLOCKS = 12, 3  # rows and segments begin in the middle of a block's part, and of a thread's turn


@pytest.fixture(scope="module")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """A backend's cats_observe by the kernel as C++, with so many counters a block."""

    @functools.cache
    def compiled(variant: Variant) -> ctypes.CDLL:
        path = tmp_path_factory.mktemp("histogram") / "kernel.so"
        macros = [f"-D{name}={value}" for name, value in variant.macros.items()]
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-unknown-pragmas", *macros]
        subprocess.run([*command, f'-DKERNEL="{histogram.SOURCE}"', "-x", "c++", SHIM, "-o", path], check=True)
        return ctypes.CDLL(str(path))

    def of(bins: int) -> Any:
        def cats_observe(
            gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, table: Tensor, scale: Tensor | None = None
        ) -> None:
            if not len(gate) or not len(slots):
                return
            variant = Variant.of(gate, activation, scale, bins)

            def launch(grid: tuple[int, int], threads: int, shared_bytes: int, *arguments: Any) -> None:
                assert shared_bytes == 4 * bins
                assert grid[1] * bins == NUM_MAGNITUDES
                values, types = nvrtc.parameters(arguments)
                run = compiled(variant).run
                run(BLOCKS, grid[1], threads, *(kind(value) for kind, value in zip(types, values, strict=True)))

            histogram.count(launch, variant, gate, offsets, slots, table, scale, THREADS)

        return SimpleNamespace(cats_observe=cats_observe)

    return of


CPU = torch.device("cpu")
ALIGNED = [
    Case(1, 32, 1, 17, 0.5, dtype, "silu", layout=layout, seed=7700 + i)
    for i, (dtype, layout) in enumerate(
        [(torch.bfloat16, "plain"), (torch.float16, "other"), (torch.float32, "plain"), (torch.bfloat16, "other")]
    )
]


@pytest.mark.parametrize("bins", [NUM_MAGNITUDES, NUM_MAGNITUDES // 2])
@pytest.mark.parametrize("case", [*SMALL[::9], *ALIGNED], ids=lambda c: c.id)
def test_counts_as_the_contract_says(emulate: Callable[[int], Any], case: Case, bins: int) -> None:
    observation.check_cats_observe(emulate(bins), CPU, case)
    scaled.check_scaled_histogram(emulate(bins), CPU, case)
    observation.check_chunks_do_not_matter(emulate(bins), CPU, case)


def test_wide_loads_are_for_aligned_rows() -> None:
    rows = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert Variant.of(rows, "silu", None, NUM_MAGNITUDES).wide
    assert Variant.of(rows[:, :32], "silu", None, NUM_MAGNITUDES).wide, "gate's columns beside up's"
    for odd in (rows[:, 1:33], rows[:, :33], torch.zeros(4, 36, dtype=torch.bfloat16)[:, :32]):
        assert not Variant.of(odd, "silu", None, NUM_MAGNITUDES).wide
    assert any(case.neurons % 8 == 0 for case in ALIGNED), "some cases are wide"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("bins", [NUM_MAGNITUDES, NUM_MAGNITUDES // 2])
def test_nvrtc_compiles_it(architecture: str, bins: int) -> None:
    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings, which torch's wheels for CUDA bring")
    source = histogram.SOURCE.read_text()
    for dtype in histogram.VALUES:
        for activation in histogram.ACTIVATIONS:
            for flags in ({"wide": True, "scaled": False}, {"wide": False, "scaled": True}):
                variant = Variant(dtype, activation, **flags, bins=bins)
                assert nvrtc.compile_source(source, variant.macros, architecture)[:4] == b"\x7fELF"


def test_what_does_not_compile_is_unavailable() -> None:
    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings, which torch's wheels for CUDA bring")
    with pytest.raises(nvrtc.Unavailable, match="undefined"):
        nvrtc.compile_source("__global__ void f() { undefined(); }", {}, "sm_90")
