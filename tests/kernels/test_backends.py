"""Every backend that this machine can run against the contract."""

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels import conformance, observation, scaled, shared_core
from tests.kernels.cases import FULL, Case
from tests.kernels.problem import problem

CPU = torch.device("cpu")
CASE_CHECKS = (
    conformance.check_dense,
    conformance.check_griffin,
    conformance.check_cats,
    conformance.check_out,
    conformance.check_padding,
    conformance.check_same_bits_twice,
    observation.check_griffin_observe,
    observation.check_shards,
    observation.check_cats_observe,
    observation.check_segment_stands_alone,
    *scaled.CHECKS,
    *shared_core.CHECKS,
)


@dataclass(frozen=True)
class Target:
    """A backend's module, the cases it runs, and what it promises: for batches of fewer than `gathers_below` tokens
    also that weights which no token keeps are not read; and, but for the `reference`, that a token's bits do not depend
    on its batch.

    The C++ backend is several: code for the processor at hand, and for lesser ones (`march`, and what that needs of
    the processor); and the path of large batches, taken by small ones too (`gathers_below` 0).
    """

    name: str
    cases: tuple[Case, ...]
    gathers_below: float
    promises: tuple[Callable[..., None], ...] = ()
    march: str = "native"
    needs: str = ""

    @property
    def label(self) -> str:
        path = "-masked" if self.name == "cpu" and not self.gathers_below else ""
        return self.name + path + (f"-{self.march}" if self.march != "native" else "")

    def load(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """The module; skips where it cannot run, with the reason."""
        if self.name == "cpu" and not shutil.which(os.environ.get("CXX") or "g++"):
            pytest.skip("caprese_kernels.cpu needs a C++ compiler: $CXX or g++")
        if self.needs and self.needs not in Path("/proc/cpuinfo").read_text().split():
            pytest.skip(f"this processor has no {self.needs}")
        module = importlib.import_module(f"caprese_kernels.{self.name}")
        if self.name == "cpu":
            library = module.library(self.march)
            monkeypatch.setattr(module, "library", lambda: library)
            for name in ("GATHER_UP_TO", "CORE_GATHER_UP_TO", "GATHER_UP_TO_ON_AMX"):
                monkeypatch.setattr(module, name, self.gathers_below - 1)
            monkeypatch.setattr(module, "SHARED_UNION", module.SHARED_UNION if self.gathers_below else -1)
        return module


CHUNKS = (observation.check_chunks_do_not_matter,)
TARGETS = (
    Target("reference", tuple(FULL[::7]), gathers_below=0),
    Target("cpu", tuple(FULL), gathers_below=65, promises=CHUNKS),
    Target("cpu", tuple(FULL[::14]), gathers_below=0, promises=CHUNKS),
    # AVX-512 with bfloat16's own instructions but without AMX, without either, and AVX2.
    Target("cpu", tuple(FULL[::14]), gathers_below=0, march="cooperlake", needs="avx512_bf16"),
    Target("cpu", tuple(FULL[1::14]), gathers_below=0, march="x86-64-v4", needs="avx512bw"),
    Target("cpu", tuple(FULL[2::14]), gathers_below=0, march="x86-64-v3", needs="avx2"),
    Target("cpu", tuple(FULL[::14]), gathers_below=65, promises=CHUNKS, march="x86-64-v4", needs="avx512bw"),
    Target("cpu", tuple(FULL[::14]), gathers_below=65, promises=CHUNKS, march="x86-64-v3", needs="avx2"),
)


def each_case() -> list[Any]:
    """A case's checks follow each other: its inputs are built once."""
    return [
        pytest.param(target, case, check, id=f"{target.label}-{check.__name__}-{case.id}")
        for target in TARGETS
        for case in target.cases
        for check in (
            *CASE_CHECKS,
            *target.promises,
            *([conformance.check_dropped_weights_do_not_matter] if case.tokens < target.gathers_below else []),
        )
    ]


@pytest.mark.parametrize(("target", "case", "check"), each_case())
def test_conforms(target: Target, case: Case, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    check(target.load(monkeypatch), CPU, case)


@pytest.mark.parametrize(
    ("target", "case"), [pytest.param(t, c, id=f"{t.label}-{c.id}") for t in TARGETS for c in t.cases]
)
def test_requests_stand_alone(target: Target, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # The C++ kernels promise it within a path; from this many tokens on another one adds up in another order.
    same_bits = target.name == "cpu" and (case.tokens < target.gathers_below or target.gathers_below == 0)
    conformance.check_request_stands_alone(target.load(monkeypatch), CPU, case, same_bits=same_bits)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("neurons", [1, 2, 7, 64, 100, 129, 257, 1000, 10_007])
def test_selects(target: Target, neurons: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conformance.check_griffin_select(target.load(monkeypatch), CPU, neurons)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_that_are_not_finite(target: Target, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    observation.check_tokens_that_are_not_finite(target.load(monkeypatch), CPU, dtype)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("seed", range(3))
def test_thresholds(target: Target, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conformance.check_cats_threshold(target.load(monkeypatch), CPU, seed)


def test_few_neurons_may_fall_on_either_side() -> None:
    """Thresholds are set in gaps between magnitudes, so that bounds decide nearly every neuron."""
    perhaps = neurons = 0
    for case in FULL:
        p = problem(case, CPU)
        perhaps += int(p.perhaps.sum())
        neurons += int(p.valid.sum()) * case.neurons
    assert perhaps < 0.005 * neurons
