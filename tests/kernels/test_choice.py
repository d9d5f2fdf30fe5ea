"""Which implementation runs, and what is said where the fast one cannot."""

import logging
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from caprese_kernels import backend, cpu, reference
from caprese_kernels.cpu import build
from caprese_kernels.errors import CapreseError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX") or "g++"), reason="needs a C++ compiler: $CXX or g++"
)


@pytest.fixture(autouse=True)
def fresh() -> None:
    """As in a new process: nothing loaded, nothing said."""
    build.library.cache_clear()
    backend._say_once.cache_clear()


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


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'g++: fatal error: out of luck' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.Unavailable, match="fatal error: out of luck"):
        build.library()


@needs_compiler
def test_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library()
    (made,) = (tmp_path / "caprese").iterdir()
    before = made.stat().st_mtime_ns
    build.library.cache_clear()
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
    with pytest.raises(build.Unavailable, match="no folder for the compiled kernels"):
        build.cache_folder()
