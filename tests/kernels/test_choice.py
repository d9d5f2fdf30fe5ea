"""Which implementation runs, and what is said where the fast one cannot."""

import logging
import os
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from caprese_kernels import backend, cpu, reference
from caprese_kernels.cpu import build
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX") or "g++"), reason="needs a C++ compiler: $CXX or g++"
)


@pytest.fixture(autouse=True)
def fresh() -> None:
    """As in a new process: nothing loaded, nothing said."""
    build._library.cache_clear()
    backend._warn_once.cache_clear()


@needs_compiler
def test_auto_takes_the_cpp_kernels_on_a_cpu() -> None:
    assert backend.choose("auto", CPU) is cpu
    assert backend.choose("cpu", CPU) is cpu
    assert backend.choose("reference", CPU) is reference


def test_without_a_compiler_the_reference_runs_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert backend.choose("auto", CPU) is reference
        assert backend.choose("auto", CPU) is reference
    assert [record.message for record in caplog.records].count(
        "Caprese: no fast kernels: no C++ compiler (no-such-compiler is not on the PATH). "
        "The reference runs instead, which reads every weight"
    ) == 1
    with pytest.raises(CapreseError, match=r"kernel 'cpu': .* no C\+\+ compiler \(no-such-compiler"):
        backend.choose("cpu", CPU)


def test_a_kernel_for_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(CapreseError, match=r"kernel 'triton': expected one that runs on cpu; .* use 'auto' or 'cpu'"):
        backend.choose("triton", CPU)
    with pytest.raises(CapreseError, match=r"kernel 'cpu': expected one that runs on cuda; .* use 'auto' or 'triton'"):
        backend.choose("cpu", CUDA)


def test_a_compiler_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'g++: fatal error: out of luck' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.Unavailable, match="fatal error: out of luck"):
        build.library()


def test_a_compiler_that_cannot_be_run_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert backend.choose("auto", CPU) is reference


@needs_compiler
def test_a_compiler_may_have_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{os.environ.get('CXX') or 'g++'} -DNOTHING")
    assert backend.choose("auto", CPU) is cpu


def test_the_sources_are_in_the_package() -> None:
    """What is compiled on first use must be installed: see package-data in pyproject.toml."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "kernels/caprese_kernels"
    packed = {path for pattern in patterns["caprese_kernels"] for path in folder.glob(pattern)}
    compiled = {folder / "cpu" / name for name in (*build.SOURCES, *build.HEADERS)}
    assert packed == compiled | {folder / "gpu" / "histogram.cu"}


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_any_number_of_threads(threads: int) -> None:
    """In a process of its own, as the number of threads is one for all."""
    code = f"""
import torch
from caprese_kernels import cpu, reference
from tests.kernels import conformance, observation
from tests.kernels.cases import SMALL
torch.set_num_threads({threads})
for case in SMALL:
    for check in (conformance.check_dense, conformance.check_griffin, conformance.check_cats,
                  observation.check_griffin_observe, observation.check_cats_observe):
        check(cpu, torch.device("cpu"), case)
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout.strip() == str(threads), done.stderr


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_batch_of_few_selections_gathers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of few prompts: more tokens than one pass takes, and no weight of a dropped neuron is read.

    Not on AMX, where multiplying all rows is faster.
    """
    monkeypatch.setattr(cpu, "_on_amx", lambda x: False)
    generator = torch.Generator().manual_seed(0)
    rows, depth = 60, 40
    gate, up, down = (torch.randn(rows, depth, generator=generator).to(dtype) / 6 for _ in range(3))
    ff = PackedFF.pack(gate, up, down.t(), "silu")
    x = torch.randn(150, depth, generator=generator).to(dtype)
    keep = torch.zeros(3, rows, dtype=torch.bool)
    keep[1, :20] = keep[2, 10:30] = True
    slots = torch.arange(150) % 4 - 1
    expected = reference.griffin_ff(x, ff, keep, slots)
    for matrix in (ff.gate, ff.up_plus, ff.down_plus):
        assert matrix is not None
        matrix[30:] = torch.nan
    found = cpu.griffin_ff(x, ff, keep, slots)
    # A handful of roundings of z and y, whose entries are below 4.
    torch.testing.assert_close(found, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert torch.equal(found[64:128], cpu.griffin_ff(x[64:128], ff, keep, slots[64:128])), "a token's bits are its own"
    monkeypatch.setattr(cpu, "SHARED_UNION", 0.4)
    assert cpu.griffin_ff(x, ff, keep, slots).isnan().any(), "half of the neurons are too many now: all are read"


@needs_compiler
def test_amx_gathers_for_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a dropped neuron show whether they were read."""
    ff = PackedFF.pack(*(torch.ones(32, 32, dtype=torch.bfloat16) for _ in range(3)), "silu")
    ff.down_plus[5] = torch.nan
    keep = torch.ones(1, 32, dtype=torch.bool)
    keep[0, 5] = False
    for amx in (False, True):
        monkeypatch.setattr(cpu, "_on_amx", lambda x, amx=amx: amx)
        for tokens in (cpu.GATHER_UP_TO_ON_AMX, cpu.GATHER_UP_TO_ON_AMX + 1):
            x, slots = torch.ones(tokens, 32, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.int64)
            read = bool(cpu.griffin_ff(x, ff, keep, slots).isnan().any())
            assert read == (amx and tokens > cpu.GATHER_UP_TO_ON_AMX), (amx, tokens)


@needs_compiler
@pytest.mark.parametrize("wrong", ["slots", "index", "count", "keep", "width", "tau", "x", "statistic", "weights"])
def test_tensors_that_the_code_would_misread_are_refused(wrong: str) -> None:
    ff = PackedFF.pack(torch.ones(4, 6), torch.ones(4, 6), torch.ones(6, 4), "silu")
    x, keep, slots = torch.ones(3, 6), torch.ones(4, 4, dtype=torch.bool), torch.tensor([0, 1, -1])
    calls = {
        "slots": lambda: cpu.griffin_ff(x, ff, keep, slots.int()),
        "index": lambda: cpu.griffin_ff(x, ff, keep, slots + 3),
        "count": lambda: cpu.griffin_ff(x, ff, keep, slots[:2]),
        "width": lambda: cpu.griffin_ff(x, ff, keep[:, :3].contiguous(), slots),
        "keep": lambda: cpu.griffin_ff(x, ff, keep.t(), slots),
        "tau": lambda: cpu.cats_ff(x, ff, torch.zeros(4, dtype=torch.float64), slots),
        "x": lambda: cpu.griffin_ff(x.bfloat16(), ff, keep, slots),
        "statistic": lambda: cpu.griffin_observe(x, torch.tensor([0, 3]), torch.tensor([0]), torch.zeros(6, 2).t()),
        "weights": lambda: PackedFF(ff.gate_up_plus, ff.down_plus.double(), "silu"),
    }
    with pytest.raises(CapreseError):
        calls[wrong]()


@needs_compiler
def test_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library()
    (made,) = (tmp_path / "caprese").iterdir()
    before = made.stat().st_mtime_ns
    build._library.cache_clear()
    build.library()
    assert [path.stat().st_mtime_ns for path in (tmp_path / "caprese").iterdir()] == [before]
    build.library("x86-64-v3")  # another processor's code is another file
    assert len(list((tmp_path / "caprese").iterdir())) == 2


def test_the_cache_is_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home that cannot be written is no reason to fail; a folder of somebody else's is never used."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert build.cache_folder() == tmp_path / f"caprese-{os.getuid()}"
    monkeypatch.setattr("os.getuid", lambda: os.stat(tmp_path).st_uid + 1)
    (tmp_path / f"caprese-{os.getuid()}").mkdir()
    with pytest.raises(build.Unavailable, match="no private folder"):
        build.cache_folder()
